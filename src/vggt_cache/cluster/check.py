"""The check before a run on several nodes: every node looks around, they meet, and all print the same table."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict

from vggt_cache.cluster import network
from vggt_cache.cluster.facts import NodeFacts, Places, look_around
from vggt_cache.cluster.meeting import Listener, Meeting, unreachable
from vggt_cache.cluster.rendezvous import Rendezvous
from vggt_cache.cluster.verdicts import Report, judge
from vggt_cache.doctor.findings import Finding

CONNECT_TIMEOUT_S = 5.0


def check_cluster(place: Rendezvous, places: Places, *, timeout_s: float) -> list[Finding]:
    """All findings, the same on every node. Raises SettingsError or MeetingError."""
    address = network.local_address_towards(network.resolve(place.master_addr))
    own = look_around(places, address=address, nodes=place.nodes)
    with Meeting(place, timeout_s=timeout_s) as meeting:
        report = Report(
            facts=[NodeFacts(**answer) for answer in meeting.exchange("facts", asdict(own))],
            clocks_s=meeting.exchange("clock", time.time()),
            sees_output=_look_for_marker(meeting, places.output_dir),
            unreachable=_try_connections(meeting, address),
        )
        return judge(report)


def _look_for_marker(meeting: Meeting, output_dir: str) -> list[bool]:
    """Whether each node sees a file that it can know of only from node 0, which makes it."""
    path = ""
    if output_dir and meeting.place.node_rank == 0:
        with suppress(OSError):
            os.makedirs(output_dir, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".check_cluster-", dir=output_dir)
            os.close(handle)
    try:
        made = meeting.exchange("marker", os.path.basename(path))[0]
        return meeting.exchange("sees marker", bool(made) and os.path.exists(os.path.join(output_dir, made)))
    finally:
        if path:
            os.unlink(path)


def _try_connections(meeting: Meeting, address: str) -> list[list[int]]:
    """For each node the ranks that it cannot reach."""
    listener = Listener()
    try:
        doors = [(host, port) for host, port in meeting.exchange("door", (address, listener.port))]
        return meeting.exchange("unreachable", unreachable(doors, timeout_s=CONNECT_TIMEOUT_S))
    finally:
        listener.close()

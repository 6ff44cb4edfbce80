"""The check before a run on several nodes: every node looks around, they meet, and all print the same
table."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
        facts = [NodeFacts(**answer) for answer in meeting.exchange("facts", own.to_json())]
        clocks_s = meeting.exchange("clock", time.time())
        return judge(
            Report(
                facts=facts,
                clocks_s=clocks_s,
                sees_output=_look_for_marker(meeting, places.output_dir),
                unreachable=_try_connections(meeting, address),
            )
        )


def _look_for_marker(meeting: Meeting, output_dir: str) -> list[bool]:
    with _marker(output_dir if meeting.place.node_rank == 0 else "") as name:
        made = meeting.exchange("marker", name)[0]
        return meeting.exchange("sees marker", bool(made) and os.path.exists(os.path.join(output_dir, made)))


@contextmanager
def _marker(folder: str) -> Iterator[str]:
    """A file that no other node can know of otherwise; its name is empty where it could not be made."""
    path = ""
    if folder:
        with suppress(OSError):
            os.makedirs(folder, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".check_cluster-", dir=folder)
            os.close(handle)
    try:
        yield os.path.basename(path)
    finally:
        if path:
            os.unlink(path)


def _try_connections(meeting: Meeting, address: str) -> list[list[int]]:
    listener = Listener()
    try:
        doors = [(host, port) for host, port in meeting.exchange("door", (address, listener.port))]
        failed: list[list[int]] = meeting.exchange(
            "unreachable", unreachable(doors, timeout_s=CONNECT_TIMEOUT_S)
        )
        return failed
    finally:
        listener.close()

"""Nodes tell each other things through a key-value store that node 0 opens on MASTER_PORT, as torchrun will.

Every wait has a limit, and who did not come is named.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from vggt_cache.cluster.network import Rendezvous
from vggt_cache.errors import VggtCacheError


class MeetingError(VggtCacheError):
    """A node did not come, or came twice."""


class Meeting:
    """One node's end of the store. Use it in a `with` statement; node 0 then stays until all have left."""

    def __init__(self, place: Rendezvous, *, timeout_s: float) -> None:
        """Raises MeetingError where node 0 cannot be reached in time, or another node has the same rank."""
        self.place = place
        self._deadline, self._timeout_s = time.monotonic() + timeout_s, timeout_s
        self._where = f"{place.master_addr}:{place.master_port}"
        leads = place.node_rank == 0
        host, port = "0.0.0.0" if leads else place.master_addr, place.master_port
        try:
            self._store = TCPStore(host, port, is_master=leads, wait_for_workers=False, timeout=self._left())
        except DistError as error:
            raise MeetingError(
                f"node 0 did not answer at {self._where} within {timeout_s:.0f} s: run check_cluster.sh there too, "
                "check MASTER_ADDR and MASTER_PORT, and that no firewall closes the port"
            ) from error
        if self._store.add(f"came/{place.node_rank}", 1) > 1:
            raise MeetingError(
                f"two nodes say that they are NODE_RANK {place.node_rank}, so one of the {place.nodes} is missing: "
                "give each node a rank of its own"
            )

    def __enter__(self) -> Meeting:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # The store ends with node 0, and the others may still be reading from it.
        with suppress(DistError, MeetingError):
            self._store.set(f"left/{self.place.node_rank}", "1")
            if self.place.node_rank == 0 and kind is None:
                self._collect("left")
        del self._store  # closes the port, also where an error keeps this object alive

    def exchange(self, topic: str, value: Any) -> list[Any]:
        """Every node's value, in order of rank; each node must call it. Raises MeetingError when one does not."""
        self._store.set(f"{topic}/{self.place.node_rank}", json.dumps(value))
        return [json.loads(text) for text in self._collect(topic)]

    def _collect(self, topic: str) -> list[bytes]:
        keys = [f"{topic}/{rank}" for rank in range(self.place.nodes)]
        try:
            self._store.wait(keys, self._left())
            return [self._store.get(key) for key in keys]
        except DistError as error:
            raise MeetingError(self._missing(keys)) from error

    def _missing(self, keys: list[str]) -> str:
        try:
            names = ", ".join(f"node {rank}" for rank, key in enumerate(keys) if not self._store.check([key]))
        except DistError:
            return f"node 0 at {self._where} ended before all had answered: see what it says"
        return (
            f"{names} did not answer within {self._timeout_s:.0f} s: run check_cluster.sh there too, with the same "
            f"MASTER_ADDR, MASTER_PORT and NNODES {self.place.nodes}, and see what it says"
        )

    def _left(self) -> timedelta:
        return timedelta(seconds=max(0.5, self._deadline - time.monotonic()))


def unreachable(addresses: Sequence[Sequence[Any]], *, timeout_s: float) -> list[int]:
    """Which of these (address, port) do not accept a connection from here, by position."""
    failed = []
    for position, (host, port) in enumerate(addresses):
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except OSError:
            failed.append(position)
    return failed

"""How fast a peer writes, reads one feature, and delivers batches, each in turns with its limit."""

from __future__ import annotations

import random
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from peers.base import Layout, Peer, is_feature, number_of
from peers.storage import RawFile, disk_bytes, is_mapped, make_durable

Seconds = dict[str, list[float]]
LIMIT_OF = {
    "write": "raw_write",
    "read": "preadv_1",
    "read_into": "preadv_1",
    "delivery": "preadv_threads",
}


def timed(work: Callable[[], None]) -> float:
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def measure_speed(
    kind: type[Peer], folder: Path, layout: Layout, *, batch_size: int, workers: int, rounds: int, writes: int
) -> dict[str, Any]:
    """Bytes per second of each way and of its limit, and the middle of the ratios of pairs."""
    seconds: Seconds = defaultdict(list)
    raw = RawFile(folder / "raw", layout, workers)
    home = folder / "kept"
    for turn in range(writes):
        shutil.rmtree(home, ignore_errors=True)
        write_both(kind(home, layout), raw, seconds, peer_first=turn % 2 == 0)
    read_in_turns(kind(home, layout), raw, seconds, batch_size, workers, rounds)
    figures: dict[str, Any] = {"disk_over_raw": disk_bytes(home) / layout.raw_bytes}
    figures["bytes_per_s"] = {
        way: layout.raw_bytes / statistics.median(found) for way, found in seconds.items()
    }
    figures["over_limit"] = {
        way: statistics.median(
            limit / found for limit, found in zip(seconds[LIMIT_OF[way]], seconds[way], strict=True)
        )
        for way in LIMIT_OF
        if way in seconds
    }
    return figures


def write_both(peer: Peer, raw: RawFile, seconds: Seconds, *, peer_first: bool) -> None:
    def write_peer() -> None:
        peer.write(lambda numbers: None)
        make_durable(peer.folder)

    ways = {"write": write_peer, "raw_write": raw.write}
    for way in sorted(ways, reverse=peer_first):
        seconds[way].append(timed(ways[way]))


def read_in_turns(
    peer: Peer, raw: RawFile, seconds: Seconds, batch_size: int, workers: int, rounds: int
) -> None:
    order = list(range(peer.layout.count))
    # Its workers are started before this process begins to read: neither has the other's files or threads.
    loader = peer.batches(batch_size, workers)
    check_batches(peer.layout, loader)
    peer.open()
    out = torch.empty(peer.layout.shape, dtype=torch.bfloat16)
    ways: dict[str, Callable[[], None]] = {
        "preadv_1": lambda: raw.read(order, 1),
        "preadv_threads": lambda: raw.read(order, workers),
        "delivery": lambda: take_all(peer.layout, loader),
    }
    if peer.random_access:
        check_reads(peer, order, out)
        ways["read"] = lambda: read_all(peer, order)
    if peer.reads_into():
        ways["read_into"] = lambda: read_all_into(peer, order, out)
    for _ in range(rounds):
        random.shuffle(order)
        for way in random.sample(list(ways), len(ways)):
            seconds[way].append(timed(ways[way]))
    peer.close()


# ---------------------------------------------------------------- the same once, looking at what comes


def check_batches(layout: Layout, loader: Iterable[Sequence[torch.Tensor]]) -> None:
    """The first epoch, which is not timed: every feature comes once, and is what was written."""
    seen = []
    for batch in loader:
        for found in batch:
            seen.append(number_of(found))
            if not is_feature(found, seen[-1], layout.shape):
                raise RuntimeError(f"a batch holds something else than feature {seen[-1]}")
    if sorted(seen) != list(range(layout.count)):
        raise RuntimeError(f"an epoch delivered {len(seen)} features, {len(set(seen))} different ones")


def check_reads(peer: Peer, order: Sequence[int], out: torch.Tensor) -> None:
    for number in order:
        found = peer.read(number)
        if not is_feature(found, number, peer.layout.shape):
            raise RuntimeError(f"reading feature {number} gave something else")
    if found is None or is_mapped(found):
        raise RuntimeError("what was read still lies in the mapped file")
    if peer.reads_into():
        peer.read_into(0, out)
        if not is_feature(out, 0, peer.layout.shape):
            raise RuntimeError("reading into a buffer gave something else")


# ---------------------------------------------------------------- what is timed


def take_all(layout: Layout, loader: Iterable[Sequence[torch.Tensor]]) -> None:
    if sum(len(batch) for batch in loader) != layout.count:
        raise RuntimeError("an epoch did not deliver every feature")


def read_all(peer: Peer, order: Sequence[int]) -> None:
    for number in order:
        peer.read(number)


def read_all_into(peer: Peer, order: Sequence[int], out: torch.Tensor) -> None:
    for number in order:
        peer.read_into(number, out)

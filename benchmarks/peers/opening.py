"""What it takes a process to open a store of many small features and read one of them."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

from bench_index import private_bytes
from peers.base import Layout, Peer, is_feature
from peers.processes import in_child
from peers.storage import disk_bytes


def fill(kind: type[Peer], folder: Path, layout: Layout) -> dict[str, Any]:
    kind(folder, layout).write(lambda numbers: None)
    os.sync()
    return {"disk_over_raw": disk_bytes(folder) / layout.raw_bytes}


def open_once(kind: type[Peer], folder: Path, layout: Layout, number: int) -> dict[str, float]:
    """With the first read, because many peers do nothing before it. The peer has been imported by now."""
    peer = kind(folder, layout)
    if not peer.random_access:
        number = 0
    before_bytes = private_bytes()
    began_s = time.perf_counter()
    peer.open()
    found = peer.read(number)
    opened_s = time.perf_counter() - began_s
    after_bytes = private_bytes()
    if not is_feature(found, number, layout.shape):
        raise RuntimeError(f"reading feature {number} gave something else")
    return {"open_s": opened_s, "private_bytes": after_bytes - before_bytes}


def measure_opening(
    kind: type[Peer], folder: Path, layout: Layout, *, processes: int, start_method: str, timeout_s: float
) -> dict[str, Any]:
    """The middle of several fresh processes."""
    written = in_child(kind.start_method, timeout_s, fill, kind, folder / "many", layout)
    numbers = [layout.count * (1 + turn) // (1 + processes) for turn in range(processes)]
    runs = [
        in_child(start_method, timeout_s, open_once, kind, folder / "many", layout, number)
        for number in numbers
    ]
    return {**written, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}}

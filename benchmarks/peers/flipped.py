"""Whether a peer notices that one bit of a feature has changed on the disk.

The bit is one of a feature's own values, found by looking for its bytes in the peer's files; where they are not to be
found, because the peer stores them in another form, it is any bit of its largest file.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from peers.base import POOL, Layout, Peer, feature, is_feature, payload
from peers.storage import files_in

WINDOW_BYTES = 64


def measure_flips(kind: type[Peer], folder: Path, layout: Layout, *, flips: int) -> dict[str, Any]:
    """Counts over all flips: `noticed` (an error or nothing), `silent` (other bytes), `unharmed` (the same bytes)."""
    if layout.count > POOL:
        raise ValueError(
            f"{layout.count} features are not all different, so a value could be another one's: {POOL}"
        )
    home = folder / "flipped"
    kind(home, layout).write(lambda numbers: None)
    counts = {"flips": flips, "in_payload": 0, "noticed": 0, "silent": 0, "unharmed": 0}
    for _ in range(flips):
        number = random.randrange(layout.count)
        place = place_in_payload(home, number, layout)
        counts["in_payload"] += place is not None
        path, offset = place or place_in_largest(home)
        flip(path, offset, bit := random.randrange(8))
        counts[answer(kind(home, layout), number)] += 1
        if path.exists():  # some remove what they cannot read
            flip(path, offset, bit)
    return counts


def place_in_payload(folder: Path, number: int, layout: Layout) -> tuple[Path, int] | None:
    """File and offset of a random byte of a feature."""
    at = random.randrange(layout.record_bytes - WINDOW_BYTES)
    window = bytes(payload(feature(number, layout.shape))[at : at + WINDOW_BYTES])
    for path in files_in(folder):
        found = path.read_bytes().find(window)
        if found >= 0:
            return path, found + random.randrange(WINDOW_BYTES)
    return None


def place_in_largest(folder: Path) -> tuple[Path, int]:
    path = max(files_in(folder), key=lambda path: path.stat().st_size)
    return path, random.randrange(path.stat().st_size)


def flip(path: Path, offset: int, bit: int) -> None:
    """In place, whatever the file's mode."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDWR)
    try:
        (value,) = os.pread(descriptor, 1, offset)
        os.pwrite(descriptor, bytes([value ^ 1 << bit]), offset)
    finally:
        os.close(descriptor)
        path.chmod(mode)


def answer(peer: Peer, number: int) -> str:
    try:
        peer.open()
        found = peer.read(number)
    except Exception:
        return "noticed"
    try:
        if found is None:
            return "noticed"
        return "unharmed" if is_feature(found, number, peer.layout.shape) else "silent"
    finally:
        peer.close()

"""Files beneath the peers: made durable, counted, and the limit of reading and writing the same bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from peers.base import Layout, feature, payload


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def make_durable(folder: Path) -> None:
    """fsync of every file and folder: what a peer leaves to its user, and next to nothing where it did so itself."""
    for path in [*files_in(folder), *_folders(folder)]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _folders(folder: Path) -> Iterator[Path]:
    yield from (path for path in folder.rglob("*") if path.is_dir())
    yield from (folder, folder.parent)


def disk_bytes(folder: Path) -> int:
    """What the files take on the disk: holes are not counted, the rest of a last block is."""
    return sum(512 * path.stat().st_blocks for path in files_in(folder))


def is_mapped(found: torch.Tensor) -> bool:
    """Whether a tensor lies in a mapped file, and so is not its owner's own."""
    with open("/proc/self/maps") as lines:
        for line in lines:
            span, _, _, _, inode, *path = line.split(maxsplit=5)
            begin, end = (int(text, 16) for text in span.split("-"))
            if begin <= found.data_ptr() < end:
                return inode != "0" and bool(path)
    return False


class RawFile:
    """The limit: the features one after the other in a file, and nothing else."""

    def __init__(self, path: Path, layout: Layout, threads: int) -> None:
        self._path = path
        self._layout = layout
        self._threads = threads
        self._buffers = [torch.empty(layout.record_bytes, dtype=torch.uint8) for _ in range(threads)]

    def write(self) -> None:
        with open(self._path, "wb", buffering=0) as file:
            for number in range(self._layout.count):
                rest = payload(feature(number, self._layout.shape))
                while rest:
                    rest = rest[file.write(rest) :]
            os.fsync(file.fileno())

    def read(self, order: Sequence[int], threads: int) -> None:
        """Every record in this order, by so many threads, each into one buffer again and again."""
        descriptor = os.open(self._path, os.O_RDONLY)
        try:
            with ThreadPoolExecutor(threads) as pool:
                list(
                    pool.map(lambda part: self._read(descriptor, order[part::threads], part), range(threads))
                )
        finally:
            os.close(descriptor)

    def _read(self, descriptor: int, order: Sequence[int], part: int) -> None:
        size, view = self._layout.record_bytes, memoryview(self._buffers[part].numpy())
        for number in order:
            if os.preadv(descriptor, [view], number * size) != size:
                raise RuntimeError("the raw file is shorter than what was written")

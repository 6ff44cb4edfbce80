"""Reads a growing log in bounded memory: a sample of what is there, most of it from the end, then what is added.

A log may have gigabytes. Its end tells the present, its beginning what the trainer announced, and a few windows
between them the way that was made; a gigabyte is opened by reading some megabytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

KIB, MIB = 2**10, 2**20
HEAD_BYTES = MIB
WINDOW_BYTES = _CHUNK_BYTES = LONGEST_PIECE_BYTES = 64 * KIB
EVEN_WINDOWS = 32
TAIL_BYTES = (256 * KIB, MIB, 4 * MIB, 16 * MIB)
"""The end is read in the first of these lengths that holds enough."""
_GUARD_BYTES = 64
_MOST_ADDED_BYTES = 32 * MIB
"""If more was added since the last look, its beginning is left out."""
_ZEROS = re.compile(rb"\0+")


class Pieces:
    """Cuts bytes into what stands between line ends, carriage returns or zeros."""

    def __init__(self, *, cut: bool) -> None:
        self.unfinished = b""
        """What stands after the last end of a piece: the newest state of a bar has no end yet."""
        self._skip = cut
        """Whether the piece that comes now lacks its beginning, so that its numbers could be wrong."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The pieces that are complete now, empty ones left out."""
        if b"\0" in chunk:  # a log that was truncated under its writer begins with zeros, perhaps gigabytes
            chunk = _ZEROS.sub(b"\n", chunk)
        pieces = (self.unfinished + chunk).replace(b"\r", b"\n").split(b"\n")
        self.unfinished = pieces.pop()
        if self._skip and pieces:
            self._skip = False
            del pieces[0]
        if self._skip or len(self.unfinished) > LONGEST_PIECE_BYTES:
            self._skip, self.unfinished = True, b""
        return [piece for piece in pieces if piece]


def sampled_extents(size: int, tail_bytes: int) -> list[tuple[int, int]]:
    """(start, stop) in bytes, in order, not overlapping: the head, windows evenly spaced and ever denser towards
    the end, and the tail."""
    tail = max(0, size - tail_bytes)
    if tail <= HEAD_BYTES:
        return [(0, size)]
    places = {size * part // EVEN_WINDOWS for part in range(EVEN_WINDOWS)}
    places |= {size - (tail_bytes << power) for power in range(1, size.bit_length())}
    extents = [(0, HEAD_BYTES)]
    for place in sorted(places):
        if extents[-1][1] <= place <= tail - WINDOW_BYTES:
            extents.append((place, place + WINDOW_BYTES))
    return [*extents, (tail, size)]


class Tail:
    """One log, opened by its path and followed through rotation and truncation. Close it when done.

    `enough` is asked, with the pieces of the end, whether they tell all that is needed. All methods raise
    OSError where the file cannot be read.
    """

    def __init__(self, path: str, enough: Callable[[Iterator[bytes]], bool]) -> None:
        self._path = path
        self._enough = enough
        self._open()

    def close(self) -> None:
        os.close(self._fd)

    @property
    def unfinished(self) -> bytes:
        return self._pieces.unfinished

    def new_pieces(self) -> Iterator[bytes]:
        """What was added since the last call; at first a sample of all there is."""
        yield from self._added()
        if self._replaced():
            left = self._fd
            self._open()
            os.close(left)
            yield from self._added()

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._measure()
        self._begin(0)

    def _measure(self) -> None:
        status = os.fstat(self._fd)
        self.size, self.modified_at_s = status.st_size, status.st_mtime

    def _begin(self, offset: int) -> None:
        self._offset = offset
        self._pieces = Pieces(cut=offset > 0)
        self._guard = b""
        """The last bytes that were read, by which it is seen that they are not there any more."""

    def _replaced(self) -> bool:
        """Whether the path now leads to another file. One that has gone is followed under its old name."""
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _added(self) -> Iterator[bytes]:
        self._measure()
        before = self._offset - len(self._guard)
        if self.size < self._offset or (
            self.size > self._offset and os.pread(self._fd, len(self._guard), before) != self._guard
        ):
            self._begin(0)  # truncated, and perhaps grown again since
        if self._offset == 0:
            *extents, (tail, _) = sampled_extents(self.size, self._tail_bytes())
            for start, stop in extents:
                yield from self._between(start, stop, Pieces(cut=start > 0))
            self._begin(tail)
        elif self.size - self._offset > _MOST_ADDED_BYTES:
            self._begin(self.size - TAIL_BYTES[-1])
        yield from self._between(self._offset, self.size, self._pieces)

    def _tail_bytes(self) -> int:
        for length in TAIL_BYTES[:-1]:
            start = max(0, self.size - length)
            if start == 0 or self._enough(self._between(start, self.size, Pieces(cut=start > 0))):
                return length
        return TAIL_BYTES[-1]

    def _between(self, start: int, stop: int, pieces: Pieces) -> Iterator[bytes]:
        while start < stop and (chunk := os.pread(self._fd, min(_CHUNK_BYTES, stop - start), start)):
            start += len(chunk)
            if pieces is self._pieces:
                self._offset, self._guard = start, (self._guard + chunk)[-_GUARD_BYTES:]
            yield from pieces.feed(chunk)

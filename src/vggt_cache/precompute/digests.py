"""Digests that are known already, so that planning an unchanged data set reads metadata and no image.

A row says: the file with this path, size, mtime, ctime and inode had this sha256. Rows only save work: a
feature's key is always computed from the bytes that are decoded, and `get` and `--verify` read the bytes
anew. A wrong row could at worst make precompute skip or repeat a frame, never serve a wrong feature.

A file `digests/<ms>-<random>.rows` belongs to one process, which appends chunks:
    magic 8 bytes | row count u64 | xxh3-64 of the rows u64 | rows, 48 bytes each: state hash 16, digest 32
A chunk torn by a crash fails its checksum; it and what follows it in that file are ignored.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import xxhash

from vggt_cache.errors import SmallFileError
from vggt_cache.small_files import FileState, SmallFolder

_MAGIC = b"VGFCdig1"
_HEADER = struct.Struct("<8sQQ")
_ROW = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("digest", "u1", 32)])
_MAX_FILE_BYTES = 128 * 2**20
"""A process goes on in another file then."""
_COARSE_CLOCK_NS = 2_000_000_000
_FINE_CLOCK_NS = 50_000_000


def state_hash(name: str, state: FileState) -> bytes:
    """16 bytes that stand for one state of one file."""
    return xxhash.xxh3_128_digest(
        name.encode("utf-8", "surrogateescape") + b"\0" + struct.pack("<qqqQ", *state)
    )


def settled(state: FileState, read_at_ns: int) -> bool:
    """Whether the file could not have changed again within the same tick of its file system's clock.

    File systems that keep whole seconds are recognised by their time stamps.
    """
    _, mtime_ns, ctime_ns, _ = state
    whole_seconds = mtime_ns % 1_000_000_000 == 0 and ctime_ns % 1_000_000_000 == 0
    return read_at_ns - max(mtime_ns, ctime_ns) > (_COARSE_CLOCK_NS if whole_seconds else _FINE_CLOCK_NS)


class DigestTable:
    """All rows that the processes of this cache directory have written."""

    def __init__(self, cache_dir: str) -> None:
        self._folder = SmallFolder(os.path.join(cache_dir, "digests"))
        self._own_name, self._own_bytes = _new_name(), 0
        self._read_to: dict[str, int] = {}
        self._rows = np.empty(0, _ROW)
        self.reload()

    def __len__(self) -> int:
        return len(self._rows)

    def reload(self) -> None:
        """Take in what other processes have appended since the last look."""
        fresh = [rows for name in self._names() for rows in self._new_chunks(name)]
        if fresh:
            rows = np.concatenate([self._rows, *fresh])
            self._rows = rows[np.argsort(rows["hi"], kind="stable")]

    def lookup(self, hashes: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.uint8]]:
        """For `hashes` [n, 2] (hi, lo): which are known [n], and their digests [n, 32]."""
        known = np.zeros(len(hashes), np.bool_)
        digests = np.zeros((len(hashes), 32), np.uint8)
        if len(self._rows) and len(hashes):
            at = np.searchsorted(self._rows["hi"], hashes[:, 0]).clip(max=len(self._rows) - 1)
            rows = self._rows[at]
            known = (rows["hi"] == hashes[:, 0]) & (rows["lo"] == hashes[:, 1])
            digests[known] = rows["digest"][known]
        return known, digests

    def append(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Write (state hash, digest) rows as one chunk. Failing to write costs a later run some reading, no more."""
        payload = b"".join(state + digest for state, digest in rows)
        if not payload:
            return
        chunk = (
            _HEADER.pack(_MAGIC, len(payload) // _ROW.itemsize, xxhash.xxh3_64_intdigest(payload)) + payload
        )
        if self._own_bytes + len(chunk) > _MAX_FILE_BYTES:
            self._own_name, self._own_bytes = _new_name(), 0
        try:
            self._folder.append(self._own_name, chunk)
            self._own_bytes += len(chunk)
        except SmallFileError:
            self._own_name, self._own_bytes = _new_name(), 0  # a torn chunk would hide those after it

    def _names(self) -> list[str]:
        try:
            return sorted(name for name in self._folder.names() if name.endswith(".rows"))
        except SmallFileError:
            return []

    def _new_chunks(self, name: str) -> list[npt.NDArray[np.void]]:
        begin = self._read_to.get(name, 0)
        try:
            data = self._folder.read(name, _MAX_FILE_BYTES, begin)
        except SmallFileError:
            return []
        chunks, at = [], 0
        while (rows := _chunk_at(data, at)) is not None:
            chunks.append(rows)
            at += _HEADER.size + rows.nbytes
        self._read_to[name] = begin + at
        return chunks


def _new_name() -> str:
    return f"{time.time_ns() // 1_000_000:012x}-{os.urandom(8).hex()}.rows"


def _chunk_at(data: bytes, at: int) -> npt.NDArray[np.void] | None:
    """The rows of the chunk that begins at `at`; None where no whole one does."""
    begin = at + _HEADER.size
    if begin > len(data):
        return None
    magic, count, checksum = _HEADER.unpack_from(data, at)
    payload = memoryview(data)[begin : begin + count * _ROW.itemsize]
    if magic != _MAGIC or len(payload) != count * _ROW.itemsize:
        return None
    return np.frombuffer(payload, _ROW) if xxhash.xxh3_64_intdigest(payload) == checksum else None


def state_hash_array(hashes: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """State hashes as [n, 2] (hi, lo), the form that `lookup` takes."""
    return np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)

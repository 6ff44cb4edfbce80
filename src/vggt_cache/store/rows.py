"""Tables of rows that only ever grow: what a process has found out once, so that no other need do it again.

A row is a hash of 16 bytes and a value of 32. A file `<folder>/<ms>-<random>.rows` belongs to one process, which
appends chunks:
    magic 8 bytes | row count u64 | xxh3-64 of the rows u64 | rows, 48 bytes each
A chunk torn by a crash fails its checksum; it and what follows it in that file are ignored. Rows are newer the later
their file's name and, in one file, the later they stand.
"""

from __future__ import annotations

import os
import re
import struct
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import xxhash

from vggt_cache.errors import SmallFileError
from vggt_cache.store.object_folder import folder_at

_HEADER = struct.Struct("<8sQQ")
_ROW = np.dtype([("hi", "<u8"), ("lo", "<u8"), ("digest", "u1", 32)])
_AGED_ROW = np.dtype([*_ROW.descr, ("file", "<u8")])
"""A row, with what orders its file among the others."""
_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}\.rows")
_LAST_MS = (1 << 48) - 1
_MAX_FILE_BYTES = 128 * 2**20
"""A process goes on in another file then."""


class RowTable:
    """The newest row of each hash, of all that the processes of a cache directory have written."""

    folder: str
    """In the cache directory."""
    magic: bytes
    """Eight bytes in front of every chunk."""

    def __init__(self, cache_dir: str) -> None:
        self._folder = folder_at(os.path.join(cache_dir, self.folder))
        self._own_name, self._own_bytes = "", 0
        self._read_to: dict[str, int] = {}
        self._rows = np.empty(0, _AGED_ROW)
        self.reload()

    def __len__(self) -> int:
        return len(self._rows)

    def reload(self) -> npt.NDArray[np.uint64]:
        """Take in what has been appended since the last look; its hashes [n, 2] (hi, lo)."""
        fresh = [rows for name in self._names() for rows in self._new_chunks(name)]
        if not fresh:
            return hash_array([])
        appended = np.concatenate(fresh)
        new = appended[
            np.lexsort((appended["file"], appended["hi"]))
        ]  # stable: rows of one file keep their order
        new = new[np.append(new["hi"][1:] != new["hi"][:-1], True)]
        self._rows = _merged(self._rows, new)
        return np.stack([appended["hi"], appended["lo"]], axis=1)

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

    def find(self, one: bytes) -> bytes | None:
        """The value of a single hash, several times faster than `lookup`; None where it is not known."""
        hi, lo = struct.unpack("<QQ", one)
        at = int(self._rows["hi"].searchsorted(np.uint64(hi)))
        if at == len(self._rows) or (row := self._rows[at])["hi"] != hi or row["lo"] != lo:
            return None
        value: bytes = row["digest"].tobytes()
        return value

    def append(self, rows: Iterable[tuple[bytes, bytes]]) -> None:
        """Write (hash 16, value 32) rows as one chunk. Failing to write costs a later run some work, no more."""
        payload = b"".join(state + digest for state, digest in rows)
        if not payload:
            return
        header = _HEADER.pack(self.magic, len(payload) // _ROW.itemsize, xxhash.xxh3_64_intdigest(payload))
        chunk = header + payload
        if not self._own_name or self._own_bytes + len(chunk) > _MAX_FILE_BYTES:
            self._own_name, self._own_bytes = self._new_name(), 0
        try:
            self._folder.append(self._own_name, chunk, alone=True)
            self._own_bytes += len(chunk)
        except SmallFileError:
            self._own_name = ""  # a torn chunk would hide those after it

    def correct(self, rows: Mapping[bytes, bytes]) -> None:
        """Write those of the rows that are not known, or are known otherwise; they are newer than all there are."""
        known, digests = self.lookup(hash_array(rows))
        found = zip(rows.items(), known, digests, strict=True)
        wrong = [row for row, is_known, digest in found if not is_known or digest.tobytes() != row[1]]
        if wrong and self._own_name != max(self._names(), default=""):
            self._own_name = ""
        self.append(wrong)

    def _names(self) -> list[str]:
        try:
            return sorted(filter(_NAME.fullmatch, self._folder.names()))
        except SmallFileError:
            return []

    def _new_name(self) -> str:
        """Later than all there are, also those of a machine whose clock is ahead."""
        newest_ms = int(max(self._names(), default="0").partition("-")[0], 16)
        ms = min(max(time.time_ns() // 1_000_000, newest_ms + 1), _LAST_MS)
        return f"{ms:012x}-{os.urandom(8).hex()}.rows"

    def _new_chunks(self, name: str) -> Iterator[npt.NDArray[np.void]]:
        """The rows that have been appended to a file since the last look."""
        begin, at = self._read_to.get(name, 0), 0
        try:
            data = self._folder.read(name, _MAX_FILE_BYTES, begin)
        except SmallFileError:
            return
        while (rows := _chunk_at(data, at, self.magic)) is not None:
            aged = np.empty(len(rows), _AGED_ROW)
            aged[["hi", "lo", "digest"]] = rows
            aged["file"] = int(name[:12] + name[13:17], 16)
            yield aged
            at += _HEADER.size + rows.nbytes
        self._read_to[name] = begin + at


def _merged(old: npt.NDArray[np.void], new: npt.NDArray[np.void]) -> npt.NDArray[np.void]:
    """Rows of different hashes, in order, with newer ones, in order too: a few are merged without sorting many."""
    at = np.searchsorted(old["hi"], new["hi"])
    place = at.clip(max=max(len(old) - 1, 0))
    known = old["hi"][place] == new["hi"] if len(old) else np.zeros(len(new), np.bool_)
    newer = known & (new["file"] >= old["file"][place]) if len(old) else known
    whole = np.dtype((np.void, _AGED_ROW.itemsize))  # field by field takes many times as long
    rows = np.insert(old.view(whole), at[~known], new[~known].view(whole)).view(_AGED_ROW)
    rows[np.searchsorted(rows["hi"], new["hi"][newer])] = new[newer]
    return rows


def _chunk_at(data: bytes, at: int, expected: bytes) -> npt.NDArray[np.void] | None:
    """The rows of the chunk that begins at `at`; None where no whole one does."""
    begin = at + _HEADER.size
    if begin > len(data):
        return None
    magic, count, checksum = _HEADER.unpack_from(data, at)
    payload = memoryview(data)[begin : begin + count * _ROW.itemsize]
    if magic != expected or len(payload) != count * _ROW.itemsize:
        return None
    return np.frombuffer(payload, _ROW) if xxhash.xxh3_64_intdigest(payload) == checksum else None


def hash_array(hashes: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """Hashes as [n, 2] (hi, lo), the form that `lookup` takes."""
    return np.frombuffer(b"".join(hashes), "<u8").reshape(-1, 2)

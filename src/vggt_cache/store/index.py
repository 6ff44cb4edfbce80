"""The index: where every record is, sorted by key. Derived from the shards, so it may be lost at any time.

Layout (little-endian; docs/format.md has it in bytes): a head with the names of the shards it covers and a
table that tells for each value of a key's leading bits where its rows are and what their checksum is; then
the rows. A lookup is one small read. The head is verified when the index is opened and each bucket when it is
read, so a damaged index is noticed and never gives an answer.

It is read with pread and never mapped: under mmap a truncated file would kill the process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from vggt_cache.errors import StoreError
from vggt_cache.store.filesystem import FileSystem, persist, release
from vggt_cache.store.rows import ROW, ROW_BYTES, ROW_DTYPE, Record, Rows, key_groups, sort_rows

MAGIC = b"vggt-idx"
VERSIONS = (1, 2)
"""2: a row has the length of its record in its last field. Written only where a record was packed by a codec."""
ROWS_PER_BUCKET = 32
MAX_BUCKET_BITS = 24

_HEAD = struct.Struct(
    "<8sIIQQQQI4x32s"
)  # magic, version, row bytes, rows, keys, shards, names bytes, bits, fingerprint
_PREFIX_BYTES = _HEAD.size + 16  # and the checksum of the whole head
_NAME_STEP = len("0123456789ab-0123456789abcdef.safetensors\n")
_SHARD_AT = 48


class IndexDamagedError(StoreError):
    """The index is not what was written. Never shown to a user: the shards are read instead."""


class Source(Protocol):
    """Bytes that can be read at any offset."""

    size: int

    def read(self, length: int, offset: int) -> bytes: ...

    def close(self) -> None: ...


class MemorySource:
    """An index held in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, length: int, offset: int) -> bytes:
        return self._data[offset : offset + length]

    def close(self) -> None:
        """Nothing to release."""


class FileSource:
    """An index in an open file. The descriptor is closed with the last reference, since threads may share it."""

    def __init__(self, fs: FileSystem, fd: int) -> None:
        self._fs = fs
        self._fd: int | None = fd
        self.size = persist(fs.fstat, fd).st_size

    def read(self, length: int, offset: int) -> bytes:
        if self._fd is None:
            raise IndexDamagedError("the index is closed")
        try:
            data = persist(self._fs.pread, self._fd, length, offset)
            while len(data) < length:
                more = persist(self._fs.pread, self._fd, length - len(data), offset + len(data))
                if not more:
                    break
                data += more
        except OSError as error:
            raise IndexDamagedError(str(error)) from error
        return data

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            release(self._fs, fd)

    def __del__(self) -> None:
        self.close()


class Index:
    """An index that can be searched. All methods raise IndexDamagedError when it is not what was written."""

    def __init__(self, source: Source, fingerprint: str) -> None:
        """Verify the head. `fingerprint`: of the specification whose store this should be the index of."""
        self._source = source
        prefix = source.read(_PREFIX_BYTES, 0)
        if len(prefix) < _PREFIX_BYTES:
            raise IndexDamagedError("the index is too short")
        magic, version, row_bytes, rows, keys, shards, names_bytes, bits, owner = _HEAD.unpack_from(prefix)
        if (magic, row_bytes) != (MAGIC, ROW_BYTES) or version not in VERSIONS or owner.hex() != fingerprint:
            raise IndexDamagedError("the index is of another version or another store")
        if bits > MAX_BUCKET_BITS or names_bytes > source.size:
            raise IndexDamagedError("the index has impossible sizes")
        padded, buckets = -(-names_bytes // 8) * 8, 1 << bits
        head_bytes = padded + 8 * (2 * buckets + 1)
        self._rows_at = _PREFIX_BYTES + head_bytes
        if self._rows_at + rows * ROW_BYTES != source.size:
            raise IndexDamagedError("the index has not the length that its head says")
        head = source.read(head_bytes, _PREFIX_BYTES)
        if xxhash.xxh3_128_digest(prefix[: _HEAD.size] + head) != prefix[_HEAD.size :]:
            raise IndexDamagedError("the index's head does not match its checksum")
        self.row_count, self.key_count, self.shard_count = rows, keys, shards
        if names_bytes != max(0, shards * _NAME_STEP - 1):
            raise IndexDamagedError("the index has not the names of its shards")
        self.names_text = head[:names_bytes].decode("ascii", "replace")
        """Names of the shards it covers, in order, joined by newlines."""
        tables = memoryview(head)[padded:].cast("Q")
        self._starts, self._checks = tables[: buckets + 1], tables[buckets + 1 :]
        self._shift = 64 - bits

    def close(self) -> None:
        self._source.close()

    def names(self) -> list[str]:
        return self.names_text.split("\n") if self.names_text else []

    def name(self, shard: int) -> str:
        """Name of a covered shard by its number."""
        return self.names_text[shard * _NAME_STEP : (shard + 1) * _NAME_STEP - 1]

    def find(self, key: bytes) -> list[tuple[int, Record]]:
        """Shard number and record of every row with this key, the latest shard first."""
        rows = self._bucket(int.from_bytes(key[:8], "big") >> self._shift)
        at = rows.find(key)
        while at % ROW_BYTES and at >= 0:
            at = rows.find(key, at + 1)
        found = []
        while 0 <= at < len(rows) and rows[at : at + 16] == key:
            _, checksum, offset, h, w, shard, stored = ROW.unpack_from(rows, at)
            self._check_shard(shard)
            found.append((shard, Record(key, offset, h, w, checksum, stored)))
            at += ROW_BYTES
        return found

    def keys_after(self, after: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """(key, shard number) of every row whose key is greater than `after`, in the order of the keys."""
        first = int.from_bytes(after[:8].ljust(8, b"\0"), "big") >> self._shift
        for bucket in range(first, len(self._checks)):
            rows = self._bucket(bucket)
            for at in range(0, len(rows), ROW_BYTES):
                key = rows[at : at + 16]
                if key > after:
                    shard = int.from_bytes(rows[at + _SHARD_AT : at + _SHARD_AT + 4], "little")
                    self._check_shard(shard)
                    yield key, shard

    def rows(self) -> Rows:
        """All rows, in the order of their keys. 56 bytes of memory each."""
        rows = np.frombuffer(b"".join(map(self._bucket, range(len(self._checks)))), ROW_DTYPE)
        if len(rows):
            self._check_shard(int(rows["shard"].max()))
        return rows

    def check_all(self) -> bool:
        """Read all of it once; True, or IndexDamagedError."""
        for bucket in range(len(self._checks)):
            self._bucket(bucket)
        return True

    def _check_shard(self, shard: int) -> None:
        if shard >= self.shard_count:
            raise IndexDamagedError(f"a row names shard {shard} of {self.shard_count}")

    def _bucket(self, bucket: int) -> bytes:
        start, stop = self._starts[bucket], self._starts[bucket + 1]
        data = self._source.read((stop - start) * ROW_BYTES, self._rows_at + start * ROW_BYTES)
        if xxhash.xxh3_64_intdigest(data) != self._checks[bucket]:
            raise IndexDamagedError(f"bucket {bucket} of the index does not match its checksum")
        return data


# ---------------------------------------------------------------- building


def build_index(rows: Rows, names: Sequence[str], fingerprint: str) -> tuple[bytes, bytes]:
    """Head and sorted rows of an index over `rows`, whose `shard` counts in `names`, which are in order."""
    rows = sort_rows(rows)
    keys = int(key_groups(rows)[-1]) + 1 if len(rows) else 0
    high = rows["high"].astype("<u8")
    bits = min(MAX_BUCKET_BITS, (len(rows) // ROWS_PER_BUCKET).bit_length())
    edges = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(1, np.uint64)
    starts = np.append(np.searchsorted(high, edges), len(rows)).astype("<u8")
    data = rows.tobytes()
    checks = _bucket_checks(data, starts)
    names_text = "\n".join(names).encode("ascii")
    head = _HEAD.pack(
        MAGIC,
        VERSIONS[bool(rows["stored"].any())],
        ROW_BYTES,
        len(rows),
        keys,
        len(names),
        len(names_text),
        bits,
        bytes.fromhex(fingerprint),
    )
    tail = names_text.ljust(-(-len(names_text) // 8) * 8, b"\0") + starts.tobytes() + checks.tobytes()
    return head + xxhash.xxh3_128_digest(head + tail) + tail, data


def _bucket_checks(data: bytes, starts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    view, bounds = memoryview(data), (starts * np.uint64(ROW_BYTES)).tolist()
    checks = [xxhash.xxh3_64_intdigest(view[a:b]) for a, b in pairwise(bounds)]
    return np.array(checks, dtype="<u8")

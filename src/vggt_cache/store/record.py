"""One record, and the table of all of them: where each feature lies, found by its key.

A row is 56 bytes, in memory as in the index. The rows are sorted by key, and a small table tells where those of each
bucket of keys begin, so a key is found among a few rows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from vggt_cache.codec import DTYPE_NAMES, ITEM_BYTES, NONE
from vggt_cache.identity import FeatureSpec


class Record(NamedTuple):
    """Where one feature lies in its shard."""

    key: bytes
    offset: int
    """From the start of the file, in bytes."""
    h: int
    """Rows of the patch grid; 1 where tokens stand in a row."""
    w: int
    """Columns, or tokens."""
    checksum: bytes
    stored_bytes: int = 0
    """Bytes in the file if a codec packed it; 0: not packed, so its shape says how many."""
    frames: int = 0
    """0 where the feature is of one frame, and has no axis of frames."""


# ---------------------------------------------------------------- bytes and checksum


def shape_of(spec: FeatureSpec, h: int, w: int, frames: int = 0) -> tuple[int, ...]:
    """The shape of a feature, of which a record has h, w and frames."""
    sides = {"frames": frames, "h": h, "w": w, "n": w}
    return tuple(axis if isinstance(axis, int) else sides[axis] for axis in spec.axes)


def sides_of(spec: FeatureSpec, shape: Sequence[int]) -> tuple[int, int, int]:
    """h, w and frames of a feature, of which one has the shape. Raises ValueError for a shape of other features."""
    sides = {"frames": 0, "h": 1}
    if len(shape) == len(spec.axes):
        sides |= {axis: side for axis, side in zip(spec.axes, shape, strict=True) if isinstance(axis, str)}
        h, w, frames = sides["h"], sides.get("w", sides.get("n", 0)), sides["frames"]
        if shape_of(spec, h, w, frames) == tuple(shape):
            return h, w, frames
    raise ValueError(f"{list(shape)} is not [{', '.join(map(str, spec.axes))}]")


def cells_of(spec: FeatureSpec, h: int, w: int, frames: int = 0) -> int:
    """How many tokens of C channels a feature has, of all its frames and layers."""
    return math.prod(shape_of(spec, h, w, frames)[:-1])


def payload_bytes(spec: FeatureSpec, h: int, w: int, frames: int = 0) -> int:
    """Bytes of a feature as it is given out."""
    return cells_of(spec, h, w, frames) * spec.encoder.channels * ITEM_BYTES[spec.feature_dtype]


def stored_length(spec: FeatureSpec, record: Record) -> int:
    """Bytes of a record in its file."""
    return record.stored_bytes or payload_bytes(spec, record.h, record.w, record.frames)


def record_checksum(
    spec: FeatureSpec,
    key: bytes,
    h: int,
    w: int,
    stored: bytes | memoryview,
    codec: str = NONE,
    frames: int = 0,
) -> bytes:
    """xxh3-128 (16 bytes, canonical order) over the bytes in the file, key, dtype name, and each side of the shape.

    Sides are u32 LE. For a packed record, the codec's name stands in place of the dtype's.
    """
    return finish_checksum(xxhash.xxh3_128(stored), spec, key, h, w, codec, frames)


def finish_checksum(
    hasher: xxhash.xxh3_128, spec: FeatureSpec, key: bytes, h: int, w: int, codec: str = NONE, frames: int = 0
) -> bytes:
    """The record's checksum from a hasher that has seen the bytes in the file."""
    shape = b"".join(side.to_bytes(4, "little") for side in shape_of(spec, h, w, frames))
    name = DTYPE_NAMES[spec.feature_dtype] if codec == NONE else codec
    hasher.update(key + name.encode() + shape)
    return hasher.digest()


# ---------------------------------------------------------------- rows

ROW_DTYPE = np.dtype(
    [
        ("high", ">u8"),  # the key, as two numbers in the order of its bytes
        ("low", ">u8"),
        ("checksum", "V16"),
        ("offset", "<u8"),
        ("h", "<u2"),
        ("frames", "<u2"),
        ("w", "<u4"),
        ("shard", "<u4"),  # number of the shard in a list of names that is kept beside the rows, in order
        ("stored", "<u4"),  # stored_bytes
    ]
)
ROW = struct.Struct("<16s16sQHHIII")
ROW_BYTES = ROW.size
Rows = npt.NDArray[np.void]
_WHOLE = np.dtype((np.void, ROW_BYTES))
_LAST_SHARD = np.uint32(2**32 - 1)


def make_rows(records: Sequence[Record]) -> Rows:
    """The rows of one shard's records; `shard` is 0."""
    packed = (ROW.pack(r.key, r.checksum, r.offset, r.h, r.frames, r.w, 0, r.stored_bytes) for r in records)
    rows: Rows = np.frombuffer(b"".join(packed), ROW_DTYPE).copy()
    return rows


def join_rows(parts: Sequence[Rows]) -> Rows:
    """A copy of the rows of all parts, one after the other."""
    # Rows are moved as bytes: field by field takes many times as long, and fields would get the machine's byte order.
    return np.concatenate([np.empty(0, _WHOLE), *(part.view(_WHOLE) for part in parts)]).view(ROW_DTYPE)


def unpack_rows(rows: Rows) -> Iterator[tuple[int, Record]]:
    """Shard number and record of each row."""
    for key, checksum, offset, h, frames, w, shard, stored in ROW.iter_unpack(rows.tobytes()):
        yield shard, Record(key, offset, h, w, checksum, stored, frames)


def sort_rows(rows: Rows) -> Rows:
    """By key; of equal keys the one in the latest shard first, which is the one that is served."""
    # By the first half of the key alone, since that is quick where most rows are in order; then what is equal there.
    order = np.argsort(_high(rows), kind="stable")
    rows = rows.view(_WHOLE).take(order).view(ROW_DTYPE)
    same = rows["high"][1:] == rows["high"][:-1]
    if same.any():
        equal = np.flatnonzero(np.append(same, False) | np.append(False, same))
        part = rows[equal]
        low = part["low"].astype("<u8")
        rows[equal] = part[np.lexsort((_LAST_SHARD - part["shard"], low, _high(part)))]
    return rows


def begins_key(rows: Rows) -> npt.NDArray[np.bool_]:
    """For each of the sorted rows whether it is the first of its key, which is the one that is served."""
    same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return np.append(True, ~same)[: len(rows)]


def record_bytes(rows: Rows, spec: FeatureSpec) -> tuple[int, int]:
    """Bytes of all features as they are given out, and as they lie in the files."""
    cells = rows["h"].astype(np.int64) * rows["w"] * np.maximum(rows["frames"], 1)
    raw = cells * payload_bytes(spec, 1, 1, 1)
    stored = rows["stored"].astype(np.int64)
    return int(raw.sum()), int(np.where(stored > 0, stored, raw).sum())


def key_array(keys: Iterable[bytes]) -> npt.NDArray[np.uint64]:
    """Keys of 16 bytes as [n, 2] (high, low), the form in which many are looked for at once."""
    return np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype("<u8")


def _high(rows: Rows) -> npt.NDArray[np.uint64]:
    return rows["high"].astype("<u8")


# ---------------------------------------------------------------- the table

_ROWS_PER_BUCKET = 8
_MAX_BUCKET_BITS = 28
_KEYS_AT_ONCE = 4096


class RecordTable:
    """All records of some shards, in memory, found by key. Immutable, so threads and forked processes share it."""

    def __init__(self, shards: Sequence[str], rows: Rows) -> None:
        """`shards`: names, in order, in which the `shard` of the sorted `rows` counts."""
        self.shards = tuple(shards)
        self.rows = rows
        bits = min(_MAX_BUCKET_BITS, (len(rows) // _ROWS_PER_BUCKET).bit_length())
        self._shift = 64 - bits
        # The first four bytes of each key, in place, tell its bucket.
        first = np.ndarray(len(rows), ">u4", rows.data, 0, (ROW_BYTES,)).astype("<u4")
        sizes = np.bincount(
            first >> np.uint32(32 - bits) if bits else np.zeros_like(first), minlength=1 << bits
        )
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.uint32).data
        """Number of the first row of each bucket; then that of all rows."""
        self._bytes = rows.view(np.uint8).data

    @classmethod
    def merged(cls, wanted: Collection[str], parts: Sequence[tuple[Sequence[str], Rows]]) -> RecordTable:
        """The shards `wanted`, each with its rows from the first part, (names, rows), that has the shard."""
        owners: dict[str, int] = {}
        for number, (names, _) in enumerate(parts):
            for name in names:
                owners.setdefault(name, number)
        shards = sorted(owners.keys() & frozenset(wanted))
        numbers = {name: number for number, name in enumerate(shards)}
        taken: list[Rows] = []
        for number, (names, rows) in enumerate(parts):
            mine = [numbers.get(name, -1) if owners[name] == number else -1 for name in names]
            if mine == list(range(len(names))):
                taken.append(rows)
                continue
            new = np.array(mine, np.int64)[rows["shard"]]
            kept = rows.view(_WHOLE)[new >= 0].view(ROW_DTYPE)
            kept["shard"] = new[new >= 0]
            taken.append(kept)
        return cls(shards, sort_rows(join_rows(taken)))

    def find(self, key: bytes) -> list[tuple[str, Record]]:
        """Shard and record of every copy of this key, the one that is served (of the latest shard) first."""
        bucket = int.from_bytes(key[:8], "big") >> self._shift
        rows = self._bytes[self._starts[bucket] * ROW_BYTES : self._starts[bucket + 1] * ROW_BYTES].tobytes()
        at = rows.find(key)
        while at % ROW_BYTES and at >= 0:  # inside of some row, by chance or on purpose
            at = rows.find(key, at + 1)
        found = []
        while at >= 0 and rows[at : at + len(key)] == key:
            _, checksum, offset, h, frames, w, shard, stored = ROW.unpack_from(rows, at)
            found.append((self.shards[shard], Record(key, offset, h, w, checksum, stored, frames)))
            at += ROW_BYTES
        return found

    def find_shards(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """For many keys (`key_array`) the number in `shards` of the one that serves it [n]; -1 where it is not here."""
        if not len(self.rows) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        order = np.argsort(
            keys[:, 0]
        )  # neighbours among the rows one after the other: that is where the time goes
        keys, shards = keys[order], np.empty(len(keys), np.int64)
        rows = self.rows[np.searchsorted(_high(self.rows), keys[:, 0]).clip(max=len(self.rows) - 1)]
        alike = rows["high"] == keys[:, 0]
        same = alike & (rows["low"] == keys[:, 1])
        shards[order] = np.where(same, rows["shard"].astype(np.int64), -1)
        for at in np.flatnonzero(alike & ~same):  # of two keys that begin alike, perhaps on purpose
            found = self.find(keys[at].astype(">u8").tobytes())
            shards[order[at]] = self.shards.index(found[0][0]) if found else -1
        return shards

    def keys(self) -> Iterator[bytes]:
        """Every key once, in order."""
        last = b""
        for start in range(0, len(self.rows), _KEYS_AT_ONCE):
            data = self._bytes[start * ROW_BYTES : (start + _KEYS_AT_ONCE) * ROW_BYTES].tobytes()
            for at in range(0, len(data), ROW_BYTES):
                key = data[at : at + 16]
                if key != last:
                    last = key
                    yield key

    def served_rows(self) -> Rows:
        """One row for each key, in order: of the copy that readers get."""
        return self.rows.view(_WHOLE)[begins_key(self.rows)].view(ROW_DTYPE)

    @cached_property
    def key_count(self) -> int:
        """Number of different keys."""
        return int(begins_key(self.rows).sum())

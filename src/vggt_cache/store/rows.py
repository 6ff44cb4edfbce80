"""Where records lie, as a table: one row of 56 bytes per record, in memory as in the index."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Record(NamedTuple):
    """Where one feature lies in its shard."""

    key: bytes
    offset: int
    """From the start of the file, in bytes."""
    h: int
    w: int
    checksum: bytes
    stored_bytes: int = 0
    """Bytes in the file of a record that a codec packed; 0: not packed, so h, w and the specification say how many."""


ROW_DTYPE = np.dtype(
    [
        ("high", ">u8"),  # the key, as two numbers in the order of its bytes
        ("low", ">u8"),
        ("checksum", "V16"),
        ("offset", "<u8"),
        ("h", "<u4"),
        ("w", "<u4"),
        ("shard", "<u4"),  # number of the shard in a list of names that is kept elsewhere, in order
        ("stored", "<u4"),  # stored_bytes
    ]
)
ROW = struct.Struct("<16s16sQIIII")
ROW_BYTES = ROW.size
Rows = npt.NDArray[np.void]
_LAST_SHARD = np.uint32(2**32 - 1)


def join_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts, in a table of its own."""
    # Not numpy.concatenate, which gives the fields the machine's byte order: here the order is the key's.
    rows = np.empty(sum(map(len, parts)), ROW_DTYPE)
    at = 0
    for part in parts:
        rows[at : at + len(part)] = part
        at += len(part)
    return rows


def unpack_rows(rows: Rows) -> Iterator[tuple[int, Record]]:
    """Shard number and record of each row."""
    for key, checksum, offset, h, w, shard, stored in ROW.iter_unpack(rows.tobytes()):
        yield shard, Record(key, offset, h, w, checksum, stored)


def sort_rows(rows: Rows) -> Rows:
    """By key; of equal keys the one in the latest shard first, which is the one that is served."""
    high, low = rows["high"].astype("<u8"), rows["low"].astype("<u8")
    return rows[np.lexsort((_LAST_SHARD - rows["shard"], low, high))]


def key_groups(rows: Rows) -> npt.NDArray[np.int64]:
    """A number for each of the sorted rows, counting up from 0, that is the same for equal keys."""
    changes = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    return np.concatenate([np.zeros(min(len(rows), 1), np.int64), np.cumsum(changes, dtype=np.int64)])

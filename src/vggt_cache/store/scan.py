"""All that the shards of one store say of themselves, read from every header, the index left aside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vggt_cache.errors import CorruptRecordError, ShardFormatError
from vggt_cache.store.parse import ForeignShardError
from vggt_cache.store.reader import ShardReader, ShardVanishedError
from vggt_cache.store.rows import Record, Rows, join_rows, key_groups, sort_rows, unpack_rows
from vggt_cache.store.tensors import ReusedMemory


@dataclass(frozen=True, kw_only=True)
class DamagedShard:
    """A shard whose header cannot be used."""

    name: str
    reason: str
    file_bytes: int
    foreign: bool
    """Intact as far as we can tell, but not ours: of another version or store, or not a plain file."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The shards with a usable header, and all of their records."""

    names: list[str]
    codecs: list[str]
    """What packed the records of each."""
    file_bytes: list[int]
    rows: Rows
    """Sorted by key, the served copy of each key first. `shard` counts in `names`."""
    damaged: list[DamagedShard]

    @property
    def served(self) -> npt.NDArray[np.bool_]:
        """For each row, whether it is the copy that readers get."""
        groups = key_groups(self.rows)
        return np.append(True, groups[1:] != groups[:-1])[: len(groups)]

    def superseded_shards(self) -> list[int]:
        """Numbers of the shards of which no record is served."""
        serving = set(np.unique(self.rows["shard"][self.served]).tolist())
        return [number for number in range(len(self.names)) if number not in serving]


def scan_store(reader: ShardReader) -> Scan:
    """Read all headers. Raises CacheAccessError."""
    names: list[str] = []
    codecs: list[str] = []
    sizes: list[int] = []
    parts: list[Rows] = []
    damaged: list[DamagedShard] = []
    for name in reader.names():
        status = reader.status(name)
        if status is None:
            continue
        try:
            header = reader.header(name)
        except ShardVanishedError:
            continue
        except ShardFormatError as error:
            foreign = isinstance(error, ForeignShardError)
            damaged.append(
                DamagedShard(name=name, reason=str(error), file_bytes=status.st_size, foreign=foreign)
            )
            continue
        header.rows["shard"] = len(names)
        parts.append(header.rows)
        names.append(name)
        codecs.append(header.codec)
        sizes.append(status.st_size)
    rows = sort_rows(join_rows(parts))
    return Scan(names=names, codecs=codecs, file_bytes=sizes, rows=rows, damaged=damaged)


class RecordChecker:
    """Reads records into reused memory and checks them."""

    def __init__(self, reader: ShardReader) -> None:
        self._reader = reader
        self._memory = ReusedMemory()

    def payload(self, shard: str, record: Record) -> memoryview | None:
        """Its bytes as they lie in the file, valid until the next call; None if damaged. Raises CacheAccessError."""
        try:
            return self._reader.read_stored(shard, record, self._memory.of)
        except CorruptRecordError:
            return None

    def intact(self, scan: Scan) -> npt.NDArray[np.bool_]:
        """For each row of the scan whether its record is intact. Reads the whole store, shard by shard."""
        result = np.zeros(len(scan.rows), np.bool_)
        order = np.lexsort((scan.rows["offset"], scan.rows["shard"]))
        for position, (shard, record) in zip(order, self._rows_in(scan, order), strict=True):
            result[position] = self.payload(scan.names[shard], record) is not None
        return result

    @staticmethod
    def _rows_in(scan: Scan, order: npt.NDArray[np.int64]) -> Iterator[tuple[int, Record]]:
        return unpack_rows(scan.rows[order])

"""One view of a store: a set of shards, and where each key lies in them.

Most rows come from the index on disk. Shards that it does not cover are read from their headers into a
supplement of the same form. The answers do not depend on how much the index covers.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import xxhash

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.index import Index
from vggt_cache.store.rows import Record, Rows, join_rows


@dataclass(frozen=True, kw_only=True)
class Level:
    """An index, and which of the shards it covers belong to the snapshot."""

    index: Index
    alive: bytes | None = None
    """One byte per shard number, 1 or 0; None where all belong."""

    @classmethod
    def over(cls, index: Index, names: Sequence[str]) -> Level:
        """The part of `index` that is about the shards `names`, which are in order."""
        if index.names_text == "\n".join(names):
            return cls(index=index)
        wanted = frozenset(names)
        alive = bytes(name in wanted for name in index.names())
        return cls(index=index, alive=None if all(alive) else alive)

    def names(self) -> list[str]:
        """Shards of the snapshot that this level covers."""
        names = self.index.names()
        if self.alive is None:
            return names
        return [name for name, alive in zip(names, self.alive, strict=True) if alive]

    def find(self, key: bytes) -> list[tuple[str, Record]]:
        found = self.index.find(key)
        if self.alive is not None:
            found = [(shard, record) for shard, record in found if self.alive[shard]]
        return [(self.index.name(shard), record) for shard, record in found]

    def keys(self, after: bytes) -> Iterator[bytes]:
        for key, shard in self.index.keys_after(after):
            if self.alive is None or self.alive[shard]:
                yield key

    def rows(self, numbers: dict[str, int]) -> Rows:
        """Rows of the shards in `numbers`, with `shard` replaced by the number given there."""
        mine = frozenset(self.names())
        renumber = np.array(
            [numbers.get(name, -1) if name in mine else -1 for name in self.index.names()], np.int64
        )
        rows = self.index.rows()
        new_number = renumber[rows["shard"]]
        kept: Rows = rows[new_number >= 0].copy()
        kept["shard"] = new_number[new_number >= 0]
        return kept


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Immutable. Methods that look at rows raise IndexDamagedError; then derive it anew without the index."""

    names: tuple[str, ...]
    """The shards, in order."""
    base: Level | None = None
    """What the index on disk told."""
    supplement: Level | None = None
    """What the headers of the other shards told."""
    damaged: tuple[tuple[str, str], ...] = field(default=())
    """Shards whose header cannot be read, and why. They hold nothing for us."""

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        return tuple(level for level in (self.base, self.supplement) if level is not None)

    def find(self, key: bytes) -> list[tuple[str, Record]]:
        """Shard and record of every copy of this key; the latest shard, which wins, first."""
        if len(self.levels) == 1:
            return self.levels[0].find(key)
        found = [hit for level in self.levels for hit in level.find(key)]
        return sorted(found, key=lambda hit: hit[0], reverse=True)

    def keys(self, after: bytes = b"") -> Iterator[bytes]:
        """Every key greater than `after` once, in order."""
        last = after
        for key in heapq.merge(*(level.keys(after) for level in self.levels)):
            if key != last:
                last = key
                yield key

    @cached_property
    def key_count(self) -> int:
        """Number of different keys."""
        if len(self.levels) == 1 and self.levels[0].alive is None:
            return int(self.levels[0].index.key_count)
        return sum(1 for _ in self.keys())

    def rows_in(self, names: Sequence[str]) -> Rows:
        """All rows of the shards `names`, unsorted; `shard` counts in `names`. 56 bytes of memory each."""
        numbers = {name: number for number, name in enumerate(names)}
        parts = [level.rows(numbers) for level in self.levels]
        return join_rows(parts)

    def digest(self, spec: FeatureSpec) -> str:
        """32 hex digits that are the same for the same set of shards of the same store."""
        return xxhash.xxh3_128_hexdigest("\n".join((spec.fingerprint, *self.names)).encode())

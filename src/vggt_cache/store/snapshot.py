"""One view of a store: a set of shards, and where each key lies in them.

Most records are known from the saved index; shards that it does not cover are read from their headers and join the
same table. The answers do not depend on how much the index covers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import xxhash

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.index import IndexFile
from vggt_cache.store.record import RecordTable, Rows, join_rows
from vggt_cache.store.shards import ShardFolder, ShardVanishedError

MAX_LISTINGS = 4
"""How often the folder is listed while shards go on to vanish."""
_FEW_SHARDS = 64
"""So many headers are read sooner than a whole index."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Immutable."""

    names: tuple[str, ...]
    """The shards, in order."""
    table: RecordTable
    """Their records."""
    damaged: tuple[tuple[str, str], ...] = ()
    """Shards whose header cannot be used, and why. The table has what could be rescued of them."""
    unindexed: tuple[str, ...] = ()
    """Shards whose header was read, because no saved index covered them."""

    def digest(self, spec: FeatureSpec) -> str:
        """32 hex digits that are the same for the same set of shards of the same store."""
        return xxhash.xxh3_128_hexdigest("\n".join((spec.fingerprint, *self.names)).encode())

    def sound_shards(self) -> list[str]:
        """Those of the table whose header is as it should be: an index may cover them."""
        damaged = {name for name, _ in self.damaged}
        return [name for name in self.table.shards if name not in damaged]


NOTHING = Snapshot(names=(), table=RecordTable((), join_rows([])))


class SnapshotTaker:
    """Takes snapshots of one store, and saves its index. Not for several threads at once."""

    def __init__(self, store_dir: str, spec: FeatureSpec, shards: ShardFolder) -> None:
        self._store_dir = store_dir
        self._shards = shards
        self.index = IndexFile(store_dir, spec.fingerprint, shards.fs)

    # ------------------------------------------------------------ taking

    def take(
        self, before: Snapshot | None = None, *, known_names: Iterable[str] = (), use_index: bool = True
    ) -> Snapshot:
        """The store as it is now; `before`, `known_names`: what is known already. Raises CacheAccessError.

        No listing is relied on to be complete: one that is made while `prune` removes a shard may show neither that
        nor the newer one that holds the same, and on a network file system one may be behind. So a shard that the
        index names, which `prune` sees to before it removes any, is looked for by its name; and when a shard proves
        to be gone, its successor may have come after the listing, so then it is listed anew.
        """
        gone: set[str] = set()
        for _ in range(MAX_LISTINGS):
            names = self._shards.names()
            # Only now: what was removed before the listing ended has its successor in here.
            loaded = self.index.load() if use_index and before is None else None
            known = set(self.index.shard_names() if loaded is None else loaded.shards)
            known.update(known_names, before.names if before is not None else ())
            missing = known.difference(names, gone)
            found = {name for name in missing if self._shards.exists(name)}
            snapshot = self._assemble(sorted({*names, *found}), loaded, before, use_index)
            vanished = {*(missing - found), *names} - {*snapshot.names} - gone
            if not vanished:
                break
            gone |= vanished
        return snapshot

    def exactly(self, names: Sequence[str]) -> Snapshot:
        """The snapshot of just these shards, in order. Raises CacheAccessError, also if one of them is gone."""
        snapshot = self._assemble(list(names), self.index.load(), None, True)
        for name in set(names) - set(snapshot.names):
            self._shards.contents(name)  # raises what is to be said of a shard that is gone
        return snapshot

    def without_index(self, snapshot: Snapshot) -> Snapshot:
        """The same shards as in `snapshot`, all read from their headers; those that are gone are left out."""
        return self._assemble(list(snapshot.names), None, None, False)

    def _assemble(
        self, names: list[str], loaded: RecordTable | None, before: Snapshot | None, use_index: bool
    ) -> Snapshot:
        """The snapshot of these shards, except those that are gone."""
        base = before or NOTHING
        if before is None and loaded is not None:
            base = Snapshot(names=loaded.shards, table=loaded)
        known = frozenset(base.names)
        new = [name for name in names if name not in known]
        parts = [(base.table.shards, base.table.rows)]
        if before is not None and use_index and len(new) > _FEW_SHARDS:
            later = self.index.load()
            if later is not None:
                parts.append((later.shards, later.rows))
                new = sorted(set(new).difference(later.shards))
        read, rows, damaged, gone = self._read_headers(new)
        present = tuple(name for name in names if name not in gone)
        table = base.table
        if read or len(parts) > 1 or not set(table.shards).issubset(present):
            table = RecordTable.merged(present, [*parts, (read, rows)])
        damaged += [item for item in base.damaged if item[0] in present]
        unindexed = {*new, *base.unindexed}.intersection(present)
        return Snapshot(
            names=present, table=table, damaged=tuple(sorted(damaged)), unindexed=tuple(sorted(unindexed))
        )

    def _read_headers(self, names: Iterable[str]) -> tuple[list[str], Rows, list[tuple[str, str]], set[str]]:
        """Shards that have records, their rows (whose `shard` counts in these), damaged with reason, and gone."""
        read: list[str] = []
        parts: list[Rows] = []
        damaged, gone = [], set()
        for name in names:
            try:
                contents = self._shards.contents(name)
            except ShardVanishedError:
                gone.add(name)
                continue
            if contents.problem:
                damaged.append((name, contents.problem))
            if not contents.problem or len(contents.rows):
                contents.rows["shard"] = len(read)
                parts.append(contents.rows)
                read.append(name)
        return read, join_rows(parts), damaged, gone

    # ------------------------------------------------------------ saving

    def save(self, snapshot: Snapshot) -> bool:
        """Save an index of `snapshot` for all readers to come; False, with a warning, where that cannot be.

        An index only saves time, so failing to save it fails nothing else. Raises CacheAccessError.
        """
        try:
            self.save_or_raise(snapshot)
        except OSError as error:
            warnings.warn(
                f"the index in {self._store_dir} could not be saved ({error}): nothing is lost, but opening this "
                "cache will read the header of every shard",
                stacklevel=3,
            )
            return False
        return True

    def save_or_raise(self, snapshot: Snapshot) -> None:
        """The same, where something depends on it. Raises OSError, CacheAccessError."""
        saved = self.index.load()
        wanted = snapshot.sound_shards()
        # What another process has named there must not be forgotten: a reader's listing may lack it.
        others = set(saved.shards).difference(snapshot.names) if saved is not None else set()
        alive = {name for name in others if self._shards.exists(name)}
        if saved is not None and alive == others and set(wanted) <= set(saved.shards):
            return
        parts = [(snapshot.table.shards, snapshot.table.rows)]
        if saved is not None and alive:
            parts.append((saved.shards, saved.rows))
        whole = not alive and len(wanted) == len(snapshot.table.shards)
        table = snapshot.table if whole else RecordTable.merged([*wanted, *alive], parts)
        self._shards.sync_names()  # what the index lists must not be lost in a power failure
        self.index.save(table)

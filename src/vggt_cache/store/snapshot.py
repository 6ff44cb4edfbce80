"""One view of a store: a set of shards, and where each key lies in them.

Most records are known from the saved index; shards that it does not cover are read from their headers and join the
same table. The answers do not depend on how much the index covers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.index import IndexFile
from vggt_cache.store.record import RecordTable, join_rows
from vggt_cache.store.shards import ShardFolder

MAX_LISTINGS = 64
"""How often the folder is listed while shards go on to vanish. A reader that a network makes slow may be overtaken
often, but each time somebody has replaced shards, so this ends with their work."""
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


NOTHING = Snapshot(names=(), table=RecordTable((), join_rows([])))


class SnapshotTaker:
    """Takes snapshots of one store, and saves its index. Not for several threads at once."""

    def __init__(
        self, store_dir: str, spec: FeatureSpec, shards: ShardFolder, *, use_index: bool = True
    ) -> None:
        self.use_index = use_index
        self.index = IndexFile(store_dir, spec.fingerprint, shards.fs)
        self._store_dir = store_dir
        self._shards = shards

    def take(self, before: Snapshot = NOTHING, *, known_names: Iterable[str] = ()) -> Snapshot:
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
            wanted = before is NOTHING or len(set(names).difference(before.names)) > _FEW_SHARDS
            loaded = self.index.load() if self.use_index and wanted else None
            known = set(self.index.shard_names() if loaded is None else loaded.shards)
            known.update(known_names, before.names)
            missing = known.difference(names, gone)
            found = {name for name in missing if self._shards.exists(name)}
            snapshot = self._assemble(sorted({*names, *found}), before, loaded)
            vanished = {*(missing - found), *names} - {*snapshot.names} - gone
            if not vanished:
                break
            gone |= vanished
        return snapshot

    def exactly(self, names: Sequence[str]) -> Snapshot:
        """The snapshot of just these shards, in order. Raises CacheAccessError, also if one of them is gone."""
        snapshot = self._assemble(names, NOTHING, self.index.load())
        for name in set(names) - set(snapshot.names):
            self._shards.contents(name)  # raises what is to be said of a shard that is gone
        return snapshot

    def without_index(self, snapshot: Snapshot) -> Snapshot:
        """The same shards without those that are gone, read from their headers, now and from now on."""
        self.use_index = False
        return self._assemble(snapshot.names, NOTHING, None)

    def _assemble(self, names: Sequence[str], before: Snapshot, loaded: RecordTable | None) -> Snapshot:
        """The snapshot of these shards, except those that are gone."""
        tables = [before.table] if loaded is None else [before.table, loaded]
        known = {*before.names, *tables[-1].shards}
        new = [name for name in names if name not in known]
        entries, rows = self._shards.read_headers(new)
        read = [entry.name for entry in entries]
        gone = set(new).difference(read)
        present = tuple(name for name in names if name not in gone)
        there = frozenset(present)
        parts = [(table.shards, table.rows) for table in tables if table.shards]
        table = tables[-1]
        if read or len(parts) > 1 or not there.issuperset(table.shards):
            table = RecordTable.merged(there, [*parts, (read, rows)])
        damaged = [(entry.name, entry.problem) for entry in entries if entry.problem]
        damaged += [item for item in before.damaged if item[0] in there]
        unindexed = there.intersection((*read, *before.unindexed))
        return Snapshot(
            names=present, table=table, damaged=tuple(sorted(damaged)), unindexed=tuple(sorted(unindexed))
        )

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
        saved = self.index.load() or NOTHING.table
        damaged = {
            name for name, _ in snapshot.damaged
        }  # no index may cover a shard whose header is not as it was
        wanted = [name for name in snapshot.table.shards if name not in damaged]
        # What another process has named there must not be forgotten: a reader's listing may lack it.
        others = set(saved.shards).difference(snapshot.names)
        alive = {name for name in others if self._shards.exists(name)}
        if saved is not NOTHING.table and alive == others and set(wanted) <= set(saved.shards):
            return
        table = snapshot.table
        if alive or len(wanted) < len(table.shards):
            parts = [(table.shards, table.rows), (saved.shards, saved.rows)]
            table = RecordTable.merged([*wanted, *alive], parts)
        self._shards.sync_names()  # what the index lists must not be lost in a power failure
        self.index.save(table)

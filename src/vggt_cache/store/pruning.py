"""Removing what no reader can get, and repairing shards with damaged records."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem
from vggt_cache.store.format import stored_length
from vggt_cache.store.layout import survey
from vggt_cache.store.maintenance import TEMP_MIN_AGE_S, dead_temp_files
from vggt_cache.store.reader import SHARDS_FOLDER, ShardReader
from vggt_cache.store.removal import remove_file, renew_index, scan_durably
from vggt_cache.store.rows import Record, key_groups, unpack_rows
from vggt_cache.store.scan import RecordChecker, Scan, scan_store
from vggt_cache.store.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class PruneAction:
    """One file that was removed, or in a dry run would be."""

    path: str
    bytes: int
    """Disk space that this frees."""
    reason: str


def prune(
    cache_dir: str | os.PathLike[str],
    *,
    dry_run: bool = True,
    damaged: bool = False,
    min_age_s: float = TEMP_MIN_AGE_S,
    fs: FileSystem = OPERATING_SYSTEM,
) -> list[PruneAction]:
    """Remove what is provably unreachable from all stores of a cache directory; returns what was done.

    - temporary files that have no living writer and were not written to for `min_age_s` seconds
    - shards of which every record is superseded by one in a later shard that was just read and found intact
    - with `damaged`: shards without a readable header; and shards with damaged records, whose intact records
      are first committed to a new shard. This reads every record of the cache.

    Never removed: shards of another format version or another specification, links, and files of other names.
    A process that has the cache open and meets a removed shard gets a CacheAccessError that tells it to
    refresh. Raises CacheNotFoundError, NotACacheError, CacheAccessError, CommitError.
    """
    path = os.path.abspath(cache_dir)
    actions: list[PruneAction] = []
    for spec in survey(path, fs).specs:
        pruner = _Pruner(path, spec, dry_run, fs)
        try:
            actions += pruner.run(damaged=damaged, min_age_s=min_age_s)
        finally:
            pruner.close()
    return actions


class _Pruner:
    """Works on one store."""

    def __init__(self, cache_dir: str, spec: FeatureSpec, dry_run: bool, fs: FileSystem) -> None:
        self._cache_dir = cache_dir
        self._store_dir = os.path.join(cache_dir, spec.short_name)
        self._spec = spec
        self._dry_run = dry_run
        self._fs = fs
        self._reader = ShardReader(self._store_dir, spec, fs=fs)
        self._checker = RecordChecker(self._reader)
        self._gone: set[str] = set()

    def close(self) -> None:
        self._reader.close()

    def run(self, *, damaged: bool, min_age_s: float) -> Iterator[PruneAction]:
        for folder, name, size in dead_temp_files(self._store_dir, min_age_s, self._fs):
            yield self._remove(folder, name, size, "a temporary file whose writer is gone")
        if damaged:
            yield from self._repair(self._scan())
        yield from self._superseded(self._scan())
        if self._gone and not self._dry_run:
            renew_index(self._cache_dir, self._spec, self._fs)

    def _scan(self) -> Scan:
        return scan_store(self._reader) if self._dry_run else scan_durably(self._reader, self._store_dir)

    # ------------------------------------------------------------ damaged

    def _repair(self, scan: Scan) -> Iterator[PruneAction]:
        for shard in scan.damaged:
            if not shard.foreign:
                yield self._remove_shard(shard.name, shard.file_bytes, shard.reason)
        intact = self._checker.intact(scan)
        kept = _first_intact_of_each_key(scan, intact)
        for number in np.unique(scan.rows["shard"][~intact]).tolist():
            mine = scan.rows["shard"] == number
            yield self._rewrite(scan, number, np.flatnonzero(mine & kept), int((mine & ~intact).sum()))

    def _rewrite(self, scan: Scan, number: int, kept: npt.NDArray[np.int64], bad: int) -> PruneAction:
        """Commit the intact records that are served from this shard to a new one, then remove the old one."""
        name = scan.names[number]
        records = [record for _, record in unpack_rows(scan.rows[kept])]
        reason = f"{bad} of its records are damaged; "
        if not records:
            return self._remove_shard(name, scan.file_bytes[number], reason + "no other is needed")
        kept_bytes = sum(stored_length(self._spec, record) for record in records)
        if not self._dry_run:
            self._copy(name, scan.codecs[number], records)
        freed = max(0, scan.file_bytes[number] - kept_bytes)
        return self._remove_shard(name, freed, reason + f"the {len(records)} others move to a new shard")

    def _copy(self, name: str, codec: str, records: list[Record]) -> None:
        count = len(records)
        with ShardWriter(self._store_dir, self._spec, max_records=count, codec=codec, fs=self._fs) as writer:
            for record in sorted(records, key=lambda record: record.offset):
                payload = self._checker.payload(name, record)
                if payload is not None:
                    writer.append_stored(record.key, record.h, record.w, payload)
            if writer.record_count:
                writer.commit()

    # ------------------------------------------------------------ superseded

    def _superseded(self, scan: Scan) -> Iterator[PruneAction]:
        groups, shards = key_groups(scan.rows), scan.rows["shard"]
        served = np.flatnonzero(scan.served)
        for number in scan.superseded_shards():
            name = scan.names[number]
            winners = served[groups[shards == number]]
            if name not in self._gone and self._all_intact(scan, winners):
                yield self._remove_shard(
                    name, scan.file_bytes[number], "later shards hold all of its records, intact"
                )

    def _all_intact(self, scan: Scan, rows: npt.NDArray[np.int64]) -> bool:
        return all(
            self._checker.payload(scan.names[shard], record) is not None
            for shard, record in unpack_rows(scan.rows[rows])
        )

    # ------------------------------------------------------------ removing

    def _remove_shard(self, name: str, size: int, reason: str) -> PruneAction:
        self._gone.add(name)
        return self._remove(os.path.join(self._store_dir, SHARDS_FOLDER), name, size, reason)

    def _remove(self, folder: str, name: str, size: int, reason: str) -> PruneAction:
        path = os.path.join(folder, name)
        if not self._dry_run:
            remove_file(folder, name, self._fs)
        return PruneAction(path=path, bytes=size, reason=reason)


def _first_intact_of_each_key(scan: Scan, intact: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """For each row whether it is what would be served if no damaged record existed."""
    positions = np.flatnonzero(intact)
    _, first = np.unique(key_groups(scan.rows)[positions], return_index=True)
    kept = np.zeros(len(scan.rows), np.bool_)
    kept[positions[first]] = True
    return kept

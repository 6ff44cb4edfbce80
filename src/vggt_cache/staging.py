"""`vggt-cache stage`: records that this machine will need, copied from a cache before they are asked for.

Each process begins at a place of its own and leaves out what others have committed meanwhile, so any number may run at
once; killed and run again, it copies what is left.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from random import SystemRandom
from typing import Any

import numpy as np
from tqdm import tqdm

from vggt_cache.errors import StoreError
from vggt_cache.place import absolute
from vggt_cache.precompute.decode import read_digest
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.plan import Plan, plan_and_tell
from vggt_cache.precompute.report import EXIT_INCOMPLETE, EXIT_OK, Reporter, bytes_text, count_of
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.samples.paths import map_in_order
from vggt_cache.store import FeatureCache
from vggt_cache.store.directory import describe_spec, select_store
from vggt_cache.store.record import Record, Rows, record_bytes, stored_length, unpack_rows
from vggt_cache.store.staged import StagedRecords, Staging


def stage_cache(
    cache_dir: str,
    local_dir: str,
    *,
    limit: str | None,
    context: str | None,
    fingerprint: str | None,
    data_root: str | None = None,
    annotation_path: str | None = None,
    data_path: str | None = None,
    num_workers: int,
) -> int:
    """Copy the records of a store, or those that some data needs, into LOCAL_DIR; what is there stays."""
    reporter, threads = Reporter(), max(1, num_workers)
    path, staging = absolute(cache_dir), Staging(local_dir=local_dir, limit=limit)
    has_data = not data_root == annotation_path == data_path is None
    spec = select_store(path, spec=None, fingerprint=fingerprint, context=context, modules=not has_data)
    staging.prepare(path, spec)
    with FeatureCache.open(path, spec=spec) as cache, closing(StagedRecords(staging, spec)) as local:
        reporter.info(f"Cache directory: {path}, {describe_spec(spec)}")
        rows = cache.table.served_rows()
        if has_data:
            named = {"annotation_path": annotation_path, "data_path": data_path}
            plan = plan_and_tell(data_root, spec.context, PrecomputeSettings.max_samples, reporter, **named)
            keys = _keys(cache, plan, threads)
            rows = rows[np.fromiter((key in keys for key in cache), np.bool_, len(rows))]
            reporter.info(f"{len(rows)} of the {len(keys)} features that this data needs are in the cache")
        return _Copying(cache, local, rows, reporter).run(threads)


def _keys(cache: FeatureCache, plan: Plan, threads: int) -> set[bytes]:
    """Of the features of these data, without those whose images cannot be read."""
    known = KnownKeys(plan, cache.spec, DigestTable(cache.cache_dir))
    unread = known.unknown_frames(range(len(plan)))
    with ThreadPoolExecutor(threads) as pool:
        paths = (plan.frames.paths[frame] for frame in unread)
        for frame, (digest, _) in zip(
            unread, map_in_order(pool, read_digest, paths, 4 * threads), strict=True
        ):
            if isinstance(digest, bytes):
                known.learn(frame, digest)
    return {key for feature in range(len(plan)) if (key := known.key(feature)) is not None}


class _Copying:
    """Of these rows of a cache, in the order of its shards, to this machine."""

    def __init__(self, cache: FeatureCache, local: StagedRecords, rows: Rows, reporter: Reporter) -> None:
        self.cache, self.local, self.rows, self.reporter = cache, local, rows, reporter
        self.stop = StopRequest()
        self.damaged = 0

    def run(self, threads: int) -> int:
        needed, missing = len(self.rows), self._missing()
        self._tell(needed, missing)
        with self.stop.listening(), self.stop.deferred():
            copied, is_full = self._copy(missing, threads)
        there, where = needed - len(self._missing()), self.local.staging.path
        self.reporter.info(f"Copied {count_of(copied, 'feature')}: {there} of {needed} are in {where}")
        if self.stop.requested:
            name = signal.Signals(self.stop.signal_number).name
            self.reporter.warn(f"Stopped by {name}: run the same command again to go on")
            return 128 + self.stop.signal_number
        if is_full:
            self.reporter.warn(
                f"{where} has no room for more within its limit: the {needed - there} others are read from "
                f"{self.cache.cache_dir}, about {1 - there / needed:.0%} of the reads of each epoch"
            )
        return EXIT_INCOMPLETE if self.damaged else EXIT_OK

    def _missing(self) -> Rows:
        here = (self.local.has(record) for _, record in unpack_rows(self.rows))
        return self.rows[~np.fromiter(here, np.bool_, len(self.rows))]

    def _tell(self, needed: int, missing: Rows) -> None:
        self.reporter.info(
            f"{needed - len(missing)} of {count_of(needed, 'feature')} are in {self.local.staging.path}; "
            f"{bytes_text(record_bytes(missing, self.cache.spec)[1])} are to be copied"
        )
        if shortfall := shortfall_of(self.cache, self.local, needed):
            self.reporter.warn(shortfall)

    def _copy(self, missing: Rows, threads: int) -> tuple[int, bool]:
        """How many were copied, and whether the limit was reached. Raises CommitError."""
        copied = 0
        total = record_bytes(missing, self.cache.spec)[1]
        with ThreadPoolExecutor(threads) as pool, _bar(total) as bar:
            try:
                for record, stored in map_in_order(pool, self._read, self._in_order(missing), 2 * threads):
                    if self.stop.requested:
                        return copied, False
                    if stored is not None:
                        if not self.local.append(record, stored):
                            return copied, True
                        copied += 1
                    bar.update(stored_length(self.cache.spec, record))
                return copied, False
            finally:
                self.local.commit()

    def _in_order(self, missing: Rows) -> Iterator[Record]:
        """As they lie in the shards, which a disk reads best, from anywhere on and round."""
        order = np.lexsort((missing["offset"], missing["shard"]))
        begin = SystemRandom().randrange(max(1, len(order)))
        for _, record in unpack_rows(missing[np.roll(order, -begin)]):
            yield record

    def _read(self, record: Record) -> tuple[Record, memoryview | None]:
        """In threads. None: another process has it by now, or it cannot be read, which is told."""
        try:
            found = None if self.local.has(record) else self.cache.stored(record.key)
        except StoreError as error:
            self.damaged += 1
            self.reporter.warn_of(
                self.damaged, f"not staged: {record.key.hex()}: {error}", "the others are only counted"
            )
            found = None
        return (record, None) if found is None else found


def _bar(total_bytes: int) -> tqdm[Any]:
    return tqdm(
        total=total_bytes, desc="Staging", unit="B", unit_scale=True, mininterval=0.5, dynamic_ncols=True
    )


def shortfall_of(cache: FeatureCache, local: StagedRecords, features: int) -> str:
    """Where a disk of this machine cannot hold so many features of a cache, what that means; else empty.

    Raises CacheAccessError.
    """
    rows = cache.table.served_rows()
    needed = features * record_bytes(rows, cache.spec)[1] // max(1, len(rows))
    place = local.place_bytes()
    if place >= needed:
        return ""
    return (
        f"{local.staging.path} has room for {bytes_text(place)} of the {bytes_text(needed)} that are read: what comes "
        f"first stays there and nothing is evicted, so about {place / needed:.0%} of the reads of each epoch will be "
        f"local, and the others come from {cache.cache_dir}; a higher limit or a larger disk has more of them"
    )

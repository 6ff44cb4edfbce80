"""`precompute` from the first line of output to the exit code."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager, suppress
from types import TracebackType

from vggt_cache.encoder import Checkpoint
from vggt_cache.errors import CacheNotFoundError, NotACacheError, SpecMismatchError, StoreError
from vggt_cache.identity import FeatureSpec
from vggt_cache.place import absolute
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.engine import engine_of
from vggt_cache.precompute.estimate import (
    DiskNeed,
    absent_sentence,
    break_even,
    hash_unknown,
    time_estimate,
    without_absent,
)
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.pipeline import Tally
from vggt_cache.precompute.plan import Plan, plan_and_tell
from vggt_cache.precompute.report import (
    EXIT_INCOMPLETE,
    EXIT_INVALID,
    EXIT_OK,
    FAILURES_FILE,
    Reporter,
    count_of,
)
from vggt_cache.precompute.settings import (
    PrecomputeSettings,
    QwenLimits,
    check_cache_dir,
    choose_compute_dtype,
)
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored
from vggt_cache.precompute.verify import recompute_some, tell_verdicts, verify_data
from vggt_cache.store import FeatureCache, create_store, list_stores
from vggt_cache.store.directory import describe_spec
from vggt_cache.store.writer import shard_bytes


def precompute(settings: PrecomputeSettings, reporter: Reporter | None = None) -> int:
    """Compute and store every feature that the data needs and the cache lacks. Returns the exit code.

    Raises VggtCacheError for what the user can cure; what was committed until then stays committed.
    """
    stop = StopRequest()
    with stop.listening(), Job(settings, reporter or Reporter()) as job:
        if not settings.dry_run:
            data = settings.data_root or settings.annotation_path or ""
            of = f"{os.path.realpath(data)} {job.spec_of_files.short_name}"
            job.reporter.list_failures(settings.cache_dir, of)
        plan = plan_and_tell(
            settings.data_root,
            settings.context,
            settings.max_samples,
            job.reporter,
            annotation_path=settings.annotation_path,
            data_path=settings.data_path,
        )
        job.begin(plan, job.spec_of_files)
        return job.tell_what_it_takes() if settings.dry_run else job.execute(stop)


class Job(AbstractContextManager["Job"]):
    """Settings and engine, for one plan after the other: `begin`, then either of the other two."""

    def __init__(self, settings: PrecomputeSettings, reporter: Reporter) -> None:
        self.settings = settings
        self.reporter = reporter
        shard_bytes()
        check_cache_dir(settings.cache_dir)
        limits = None
        if settings.model_path is not None:
            limits = QwenLimits.read(
                settings.model_path, min_pixels=settings.min_pixels, max_pixels=settings.max_pixels
            )
        checkpoint = Checkpoint.open(settings.vggt_model_path, layer=settings.wanted_layers)
        self.engine = engine_of(settings, reporter)
        self.spec_of_files = FeatureSpec(
            encoder=checkpoint.spec(choose_compute_dtype(settings.compute_dtype, self.engine.device)),
            preprocessing=settings.preprocessing,
            context=settings.context,
            feature_dtype=settings.feature_dtype,
            layers=checkpoint.layers if len(checkpoint.layers) > 1 else (),
            tokens=settings.tokens,
            pool=settings.pool_size,
        )
        self.engine.prepare(checkpoint, self.spec_of_files, limits)
        self._begun = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    def begin(self, plan: Plan, spec: FeatureSpec) -> None:
        """What is wanted next, before anything is written."""
        self.plan, self.spec = plan, spec
        self.committed = 0
        """Features of this plan on disk, written by this process."""
        self._begun += 1
        self.known = KnownKeys(plan, spec, DigestTable(self.settings.cache_dir))
        self.need = DiskNeed(plan, spec, self.settings, self.reporter)

    def tell_what_it_takes(self) -> int:
        """A dry run: it makes no cache, and writes nothing into one that is there."""
        try:
            with FeatureCache.open(self.settings.cache_dir, spec=self.spec) as cache:
                stored = Stored(self.known, cache, recompute=not self.settings.skip_existing)
                _, possible = self._tell(stored, stored.all_missing())
        except (CacheNotFoundError, NotACacheError, SpecMismatchError):
            _, possible = self._tell(None, list(range(len(self.plan))))
        if possible:
            self.reporter.info(time_estimate(self.plan, self.spec, possible, self.engine, self.reporter))
            self.reporter.info(break_even(self.need, possible, self.engine))
        self.reporter.info("Dry run: nothing was computed or written")
        return EXIT_INCOMPLETE if self.reporter.failures or self.absent else EXIT_OK

    def execute(self, stop: StopRequest) -> int:
        settings = self.settings
        if self._begun == 1:
            self._tell_of_others()
        create_store(settings.cache_dir, self.spec)
        with FeatureCache.open(settings.cache_dir, spec=self.spec) as cache:
            stored = Stored(self.known, cache, recompute=not settings.skip_existing)
            missing, possible = self._tell(stored, stored.all_missing())
            if possible and self._begun == 1 and self.reporter.rank == 0:
                self.reporter.info(break_even(self.need, possible, self.engine))
            tally = Tally()
            if missing:
                tally = self.engine.compute(stored, self.plan.blocks_of(missing), stop)
            self.committed = tally.committed
            if stop.requested:
                return self._stopped(stop)
            self._tell_mended(stored)
            self._tell_result(tally)
            invalid = self._verify(cache) if settings.verify and self.reporter.rank == 0 else 0
            wrong = bool(settings.recompute) and recompute_some(
                cache, self.plan, self.engine, settings.recompute, self.reporter
            )
        if wrong or invalid > len(tally.lost):
            return EXIT_INVALID
        return EXIT_INCOMPLETE if self.reporter.failures else EXIT_OK

    def _tell_of_others(self) -> None:
        """Where the directory gets another specification beside those that it holds."""
        with suppress(StoreError):
            others = list_stores(self.settings.cache_dir)
            if others and self.spec not in others and self.reporter.rank == 0:
                self.reporter.warn(
                    f"{self.settings.cache_dir} holds {'; '.join(map(describe_spec, others))}, and now gets "
                    f"{describe_spec(self.spec)} beside it: say which one is meant, by --context, or by "
                    f"VGGT_CACHE_FINGERPRINT={self.spec.fingerprint[:8]}; `vggt-cache prune {self.settings.cache_dir} "
                    "--spec FINGERPRINT` removes one"
                )

    def _tell(self, stored: Stored | None, missing: list[int]) -> tuple[list[int], list[int]]:
        """What is missing, and whether the disk has room for it. Returns it, and what of it can be computed."""
        spec, plan, info = self.spec, self.plan, self.reporter.info
        self.absent, possible = without_absent(plan, missing)
        if (
            stored is not None
            and len(stored.cache)
            and (self.settings.dry_run or not self.need.fits(possible))
        ):
            # Images that were only touched or copied have features already; only their bytes tell.
            hash_unknown(self.known, possible, self.reporter, keep=not self.settings.dry_run)
            missing, possible = stored.missing(missing), stored.missing(possible)
        if self._begun == 1:
            wide = f"{spec.preprocessing.image_size} pixels wide"
            info(
                f"Context: {spec.context} ({spec.context_rule.seen}); "
                f"{'pixels as given' if spec == spec.of_given_pixels else wide}, "
                f"{spec.kept_text}, computed in {spec.encoder.compute_dtype}, stored in {spec.feature_dtype}"
            )
        if spec.context_rule.shares_prefixes:
            unshared, shared = plan.passes(range(len(plan)))
            info(
                f"{count_of(plan.sample_count, 'sample')}, {count_of(len(plan), 'distinct frame list')}; "
                f"frame passes: {unshared} before sharing, {shared} after"
            )
        if len(missing) < len(plan):
            info(f"Already in the cache: {len(plan) - len(missing)}")
        if plan.history_only:
            info(
                f"Images that are only history of samples: {plan.history_only}; their features are made too, but "
                "training reads that of each sample's last image alone"
            )
        info(f"Unique {self.settings.noun}s to process: {len(missing)}")
        if self.absent:
            self.reporter.warn(
                absent_sentence(plan, self.absent, len(missing) - len(possible), self.settings.noun)
            )
        if possible:
            self.need.check(possible)
        return missing, possible

    def _tell_result(self, tally: Tally) -> None:
        settings, failures = self.settings, self.reporter.failures
        if tally.elsewhere:
            self.reporter.info(
                f"{tally.elsewhere} more were already stored: computed by other processes, or equal to a feature under "
                "another path"
            )
        self.reporter.success(f"Processed {self.committed} {settings.noun}s")
        self.reporter.info(f"Cache directory: {absolute(settings.cache_dir)}")
        if failures:
            listed = os.path.join(settings.cache_dir, FAILURES_FILE) if self.reporter.lists_failures else ""
            self.reporter.warn(
                f"{count_of(len(failures), 'input')} could not be used and what depends on them is not in the cache"
                + (f"; they are listed in {listed}" if listed else "")
            )

    def _tell_mended(self, stored: Stored) -> None:
        """Take from the list of failures what this data has no longer, or a feature in the store now depends on."""
        earlier, plan = self.reporter.earlier_failures(), self.plan
        if not earlier or self.settings.max_samples >= 0:
            return
        stored.refresh()
        missing = set(stored.all_missing())
        wanted = [(feature in missing, feature) for feature in range(len(plan))]
        usable = {path for lost, feature in wanted if not lost for path in plan.paths_of(feature)}
        failing = {path for lost, feature in wanted if lost for path in plan.paths_of(feature)} - usable
        failing |= {plan.label(feature) for feature in missing}
        mended = [path for path in earlier if path not in failing]
        self.reporter.mended(mended)
        if mended:
            self.reporter.info(f"{count_of(len(mended), 'earlier failure')} in {FAILURES_FILE} mended since")

    def _stopped(self, stop: StopRequest) -> int:
        self.reporter.warn(
            f"Stopped by {signal.Signals(stop.signal_number).name}: {count_of(self.committed, self.settings.noun)} of "
            f"this run are committed in {absolute(self.settings.cache_dir)}; run the same command again to go on"
        )
        return 128 + stop.signal_number

    def _verify(self, cache: FeatureCache) -> int:
        """How many features are missing or damaged."""
        verdicts = verify_data(cache, self.plan, threads=max(4, self.settings.num_workers))
        return tell_verdicts(verdicts, len(self.plan), self.reporter, self.settings.noun)

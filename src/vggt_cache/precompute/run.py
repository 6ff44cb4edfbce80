"""`precompute` from the first line of output to the exit code."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.errors import CacheNotFoundError, NotACacheError, SpecMismatchError
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodePool
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.encode import BatchEncoder, is_out_of_memory, out_of_memory
from vggt_cache.precompute.estimate import disk_need, time_need
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.observer import RunObserver
from vggt_cache.precompute.pipeline import Pipeline
from vggt_cache.precompute.plan import KnownKeys, plan_and_tell
from vggt_cache.precompute.present import Present
from vggt_cache.precompute.qwen import QwenLimits
from vggt_cache.precompute.report import (
    EXIT_INCOMPLETE,
    EXIT_INVALID,
    EXIT_OK,
    Reporter,
    bytes_text,
    count_of,
)
from vggt_cache.precompute.settings import PrecomputeSettings, choose_compute_dtype, choose_device
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.verify import LARGEST_RELATIVE_ERROR, largest_relative_error, verify_data
from vggt_cache.precompute.write import BlockDone, FeatureWriter, shard_bytes
from vggt_cache.store import FeatureCache, ShardWriter, create_store


def precompute(settings: PrecomputeSettings, reporter: Reporter | None = None) -> int:
    """Compute and store every feature that the data needs and the cache lacks. Returns the exit code.

    Raises VggtCacheError for what the user can cure; what was committed until then stays committed.
    """
    stop = StopRequest()
    with stop.listening():
        job = _Job(settings, reporter or Reporter())
        if settings.dry_run:
            return _tell_what_it_takes(job)
        create_store(settings.cache_dir, job.spec)
        with FeatureCache.open(settings.cache_dir, spec=job.spec) as cache:
            return _Run(job, cache, stop).execute()


class _Job:
    """What is wanted, before anything is written: settings, data, and the specification of the features."""

    def __init__(self, settings: PrecomputeSettings, reporter: Reporter) -> None:
        self.settings = settings
        self.reporter = reporter
        self.failures = FailureLog(settings.cache_dir, reporter, write=not settings.dry_run)
        self.shard_bytes = shard_bytes()
        self.limits = QwenLimits.read(settings.model_path) if settings.model_path else None
        self.device = choose_device(settings.device)
        self.checkpoint = Checkpoint.open(settings.vggt_model_path, layer=settings.layer)
        self.plan = plan_and_tell(
            settings.data_root, settings.context, settings.max_samples, reporter, self.failures
        )
        compute_dtype = choose_compute_dtype(settings.compute_dtype, self.device)
        self.spec = settings.feature_spec(self.checkpoint.spec(compute_dtype))
        self.table = DigestTable(settings.cache_dir)
        self.known = KnownKeys(self.plan, self.spec, self.table)

    @cached_property
    def encoder(self) -> BatchEncoder:
        """Loaded when it is first needed: a run that finds all in the cache loads none."""
        try:
            encoder: Encoder = self.checkpoint.load(
                device=self.device, compute_dtype=self.spec.encoder.compute_dtype
            )
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise out_of_memory(self.device, "the encoder's weights alone") from error
            raise
        self.reporter.info("Model loaded successfully")
        return BatchEncoder(
            encoder, self.settings.batch_size, self._tell_halved, feature_dtype=self.spec.feature_dtype
        )

    def missing(self, present: Present | frozenset[bytes]) -> list[int]:
        """The wanted features that are not known to be stored; told, and their size compared with the disk."""
        missing = [
            f for f in range(len(self.plan)) if (key := self.known.key(f)) is None or key not in present
        ]
        self._tell_what(len(missing))
        if missing:
            need = disk_need(self.plan, self.spec, missing, self.settings.cache_dir, self.settings.codec)
            if self.settings.dry_run:
                self.reporter.info(
                    f"Disk: {bytes_text(need.total_bytes)} for {count_of(len(missing), self.settings.noun)} of "
                    f"{bytes_text(need.feature_bytes)}{need.remark}; {bytes_text(need.free_bytes)} free"
                )
            if not self.settings.force:
                need.check(self.settings.cache_dir)
        return missing

    def _tell_what(self, missing: int) -> None:
        spec, plan = self.spec, self.plan
        self.reporter.info(
            f"Context: {spec.context} ({spec.context_rule.seen}); {spec.preprocessing.image_size} pixels wide, "
            f"layer {spec.encoder.layer}, computed in {spec.encoder.compute_dtype}, stored in {spec.feature_dtype}"
        )
        if spec.context_rule.shares_prefixes:
            unshared, shared = plan.passes()
            self.reporter.info(
                f"{count_of(plan.sample_count, 'sample')}, {count_of(len(plan), 'distinct frame list')}; "
                f"frame passes: {unshared} before sharing, {shared} after"
            )
        if missing < len(plan):
            self.reporter.info(f"Already in the cache: {len(plan) - missing}")
        self.reporter.info(f"Unique {self.settings.noun}s to process: {missing}")

    def _tell_halved(self, batch_size: int) -> None:
        self.reporter.warn(f"out of memory: going on with --batch_size {batch_size}")


def _tell_what_it_takes(job: _Job) -> int:
    """A dry run: it makes no cache, and writes nothing into one that is there."""
    try:
        with FeatureCache.open(job.settings.cache_dir, spec=job.spec) as cache:
            missing = job.missing(Present(cache, recompute=not job.settings.skip_existing))
    except (CacheNotFoundError, NotACacheError, SpecMismatchError):
        missing = job.missing(frozenset())
    if missing:
        need = time_need(job.plan, job.spec, missing, job.encoder)
        job.reporter.info(
            need.sentence() if need else "No time estimate: none of the sampled images can be read"
        )
    job.reporter.info("Dry run: nothing was computed or written")
    return EXIT_OK


class _Run:
    """One process's run over a job, with its cache."""

    def __init__(self, job: _Job, cache: FeatureCache, stop: StopRequest) -> None:
        self.job = job
        self.cache = cache
        self.stop = stop
        self.settings, self.reporter = job.settings, job.reporter
        self.present = Present(cache, recompute=not job.settings.skip_existing)
        self.lost = 0
        """Wanted features that could not be computed."""
        self.elsewhere = 0
        """Wanted features that turned out to be stored already."""

    def execute(self) -> int:
        missing = self.job.missing(self.present)
        processed = 0
        if missing:
            processed = self._compute(missing)
            self.cache.refresh()
            self.cache.save_index()
        if self.stop.requested:
            return self._stopped(processed)
        self._tell_result(processed)
        invalid = self._verify() if self.settings.verify and self.reporter.rank == 0 else 0
        wrong = self._recompute() if self.settings.recompute else False
        if wrong or invalid > self.lost:
            return EXIT_INVALID
        return EXIT_INCOMPLETE if self.job.failures.count else EXIT_OK

    # ------------------------------------------------------------ steps

    def _compute(self, missing: list[int]) -> int:
        """Run the pipeline; returns how many features this process has committed."""
        job, settings = self.job, self.settings
        store_dir = Path(settings.cache_dir) / job.spec.short_name
        encoder = job.encoder  # before anything is claimed: loading takes long, and may fail
        with ExitStack() as stack:
            decoder = stack.enter_context(DecodePool(settings.num_workers, job.spec.preprocessing))
            bar = stack.enter_context(self.reporter.bar(len(missing), settings.noun))
            observer = RunObserver(bar, self.reporter, job.limits)
            claims = stack.enter_context(Claims(store_dir / "claims", on_silence=observer.silence))

            def written(features: int) -> None:
                bar.update(features)
                claims.progressed()

            stack.enter_context(self.stop.deferred())
            writer = FeatureWriter(
                lambda: ShardWriter(store_dir, job.spec, codec=settings.codec),
                feature_dtype=job.spec.feature_dtype,
                shard_bytes=job.shard_bytes,
                on_commit=lambda blocks: _committed(blocks, job.table, claims),
                on_written=written,
                on_bad_feature=self._not_stored,
            )
            pipeline = Pipeline(
                known=job.known,
                present=self.present,
                claims=claims,
                decoder=decoder,
                encoder=encoder,
                writer=writer,
                failures=job.failures,
                stop=self.stop,
                observer=observer,
            )
            try:
                pipeline.run(set(missing))
            finally:
                observer.waits_for = "the disk"
                self.lost += len(pipeline.failed)
                self.elsewhere = observer.elsewhere
                writer.close()
        return writer.committed

    def _tell_result(self, processed: int) -> None:
        failures = self.job.failures
        if self.elsewhere:
            self.reporter.info(
                f"{self.elsewhere} more were already stored: computed by other processes, or equal to a feature "
                "under another path"
            )
        self.reporter.success(f"Processed {processed} {self.settings.noun}s")
        self.reporter.info(f"Cache directory: {os.path.abspath(self.settings.cache_dir)}")
        if failures.count:
            self.reporter.warn(
                f"{count_of(failures.count, 'input')} could not be used and what depends on them is not in the "
                f"cache; they are listed in {failures.path}"
            )

    def _stopped(self, processed: int) -> int:
        name = "SIGINT" if self.stop.signal_number == 2 else "SIGTERM"
        self.reporter.warn(
            f"Stopped by {name}: {count_of(processed, self.settings.noun)} of this run are committed in "
            f"{os.path.abspath(self.settings.cache_dir)}; run the same command again to go on"
        )
        return 128 + self.stop.signal_number

    def _verify(self) -> int:
        plan = self.job.plan
        with tqdm(total=len(plan), desc="Verifying", unit=self.settings.noun, mininterval=1.0) as bar:
            result = verify_data(
                self.cache,
                plan,
                threads=max(4, self.settings.num_workers),
                on_invalid=self.reporter.invalid,
                on_progress=bar.update,
            )
        self.reporter.info(str(result))
        return result.invalid

    def _recompute(self) -> bool:
        """Whether a recomputed feature differs by more than rounding can explain."""
        compared, error, label = largest_relative_error(
            self.cache, self.job.plan, self.job.encoder.encoder, self.settings.recompute
        )
        self.reporter.info(
            f"Recomputed {count_of(compared, 'feature')}: largest relative error {error:.2e} ({label or 'none stored'})"
        )
        if error > LARGEST_RELATIVE_ERROR:
            self.reporter.warn(
                f"a relative error over {LARGEST_RELATIVE_ERROR} is more than rounding: the cache holds wrong "
                "features; do not train from it, and report this"
            )
        return error > LARGEST_RELATIVE_ERROR

    def _not_stored(self, label: str, reason: str) -> None:
        self.lost += 1
        self.job.failures.add(label, reason)


def _committed(blocks: Iterable[BlockDone], table: DigestTable, claims: Claims) -> None:
    """A shard is on disk: note the digests first, then give the claims back, so that others find all done."""
    blocks = list(blocks)
    claims.progressed()
    table.append(row for block in blocks for row in block.rows)
    for block in blocks:
        claims.release(block.block_id)

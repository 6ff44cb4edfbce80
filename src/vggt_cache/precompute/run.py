"""`precompute` from the first line of output to the exit code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.errors import CacheNotFoundError, NotACacheError, SpecMismatchError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodePool
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.encode import BatchEncoder, is_out_of_memory, out_of_memory
from vggt_cache.precompute.estimate import disk_need, time_need
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.observer import RunObserver
from vggt_cache.precompute.pipeline import Pipeline, Present
from vggt_cache.precompute.plan import KnownKeys, Plan
from vggt_cache.precompute.qwen import QwenLimits
from vggt_cache.precompute.report import Reporter, bytes_text, count_of
from vggt_cache.precompute.scan import scan_data
from vggt_cache.precompute.settings import PrecomputeSettings, choose_compute_dtype, choose_device
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.verify import LARGEST_RELATIVE_ERROR, largest_relative_error, verify_data
from vggt_cache.precompute.write import BlockDone, FeatureWriter, shard_bytes
from vggt_cache.store import FeatureCache, ShardWriter, create_store

EXIT_OK, EXIT_INVALID, EXIT_INCOMPLETE = 0, 1, 3
"""All is well; verification found fault; some inputs could not be used (they stand in failures.jsonl)."""


def precompute(settings: PrecomputeSettings, reporter: Reporter | None = None) -> int:
    """Compute and store every feature that the data needs and the cache lacks. Returns the exit code.

    Raises VggtCacheError for what the user can cure; what was committed until then stays committed.
    """
    stop = StopRequest()
    with stop.listening():
        return _Run(settings, reporter or Reporter(), stop).execute()


class _Run:
    def __init__(self, settings: PrecomputeSettings, reporter: Reporter, stop: StopRequest) -> None:
        self.settings = settings
        self.reporter = reporter
        self.stop = stop
        self.failures = FailureLog(settings.cache_dir, reporter, write=not settings.dry_run)
        self.lost = 0
        """Wanted features that could not be computed."""
        self.elsewhere = 0
        """Wanted features that turned out to be stored already."""
        self.shard_bytes = shard_bytes()
        self.limits = QwenLimits.read(settings.model_path) if settings.model_path else None

    def execute(self) -> int:
        settings = self.settings
        device = choose_device(settings.device)
        checkpoint = Checkpoint.open(settings.vggt_model_path, layer=settings.layer)
        plan = scan_data(
            settings.data_root, settings.context, settings.max_samples, self.reporter, self.failures
        )
        spec = settings.feature_spec(checkpoint.spec(choose_compute_dtype(settings.compute_dtype, device)))
        cache = self._open_cache(spec)
        table = DigestTable(settings.cache_dir)
        known = KnownKeys(plan, spec, table)
        present = Present(cache, recompute=not settings.skip_existing) if cache is not None else None
        pending = [
            f
            for f in range(len(plan))
            if present is None or (key := known.key(f)) is None or key not in present
        ]
        self._say_what(plan, spec, pending)
        if pending:
            need = disk_need(plan, spec, pending, settings.cache_dir, settings.codec)
            if settings.dry_run:
                self.reporter.info(
                    f"Disk: {bytes_text(need.total_bytes)} for {count_of(len(pending), settings.noun)} of "
                    f"{bytes_text(need.feature_bytes)}{need.remark}; {bytes_text(need.free_bytes)} free"
                )
            if not settings.force:
                need.check(settings.cache_dir)
        encoder = None
        if pending or settings.recompute:
            encoder = _load(checkpoint, device, spec.encoder.compute_dtype)
            self.reporter.info("Model loaded successfully")
        if settings.dry_run:
            return self._finish_dry_run(plan, spec, pending, encoder)
        assert cache is not None
        assert present is not None
        with cache:
            return self._compute_and_check(plan, spec, cache, known, present, table, pending, encoder)

    # ------------------------------------------------------------ steps

    def _open_cache(self, spec: FeatureSpec) -> FeatureCache | None:
        """The store for this specification; a dry run makes none."""
        settings = self.settings
        if settings.dry_run:
            try:
                return FeatureCache.open(settings.cache_dir, spec=spec)
            except (CacheNotFoundError, NotACacheError, SpecMismatchError):
                return None
        create_store(settings.cache_dir, spec)
        return FeatureCache.open(settings.cache_dir, spec=spec)

    def _say_what(self, plan: Plan, spec: FeatureSpec, pending: Sequence[int]) -> None:
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
        if len(pending) < len(plan):
            self.reporter.info(f"Already in the cache: {len(plan) - len(pending)}")
        self.reporter.info(f"Unique {self.settings.noun}s to process: {len(pending)}")

    def _finish_dry_run(
        self, plan: Plan, spec: FeatureSpec, pending: list[int], encoder: Encoder | None
    ) -> int:
        if pending and encoder is not None:
            need = time_need(
                plan, spec, pending, BatchEncoder(encoder, self.settings.batch_size, self._halved)
            )
            self.reporter.info(
                need.sentence() if need else "No time estimate: none of the sampled images can be read"
            )
        self.reporter.info("Dry run: nothing was computed or written")
        return EXIT_OK

    def _compute_and_check(
        self,
        plan: Plan,
        spec: FeatureSpec,
        cache: FeatureCache,
        known: KnownKeys,
        present: Present,
        table: DigestTable,
        pending: list[int],
        encoder: Encoder | None,
    ) -> int:
        processed = 0
        if pending and encoder is not None:
            processed = self._compute(plan, spec, known, present, table, pending, encoder)
            cache.refresh()
            cache.save_index()
        if self.stop.requested:
            return self._stopped(processed)
        if self.elsewhere:
            self.reporter.info(
                f"{self.elsewhere} more turned out to be stored: computed by other processes, or equal to a feature "
                "under another path"
            )
        self.reporter.success(f"Processed {processed} {self.settings.noun}s")
        self.reporter.info(f"Cache directory: {os.path.abspath(self.settings.cache_dir)}")
        if self.failures.count:
            self.reporter.warn(
                f"{count_of(self.failures.count, 'input')} could not be used and what depends on them is not in the "
                f"cache; they are listed in {self.failures.path}"
            )
        invalid = self._verify(plan, cache) if self.settings.verify and self.reporter.rank == 0 else 0
        wrong = (
            self._recompute(plan, cache, encoder)
            if self.settings.recompute and encoder is not None
            else False
        )
        if wrong or invalid > self.lost:
            return EXIT_INVALID
        return EXIT_INCOMPLETE if self.failures.count else EXIT_OK

    def _compute(
        self,
        plan: Plan,
        spec: FeatureSpec,
        known: KnownKeys,
        present: Present,
        table: DigestTable,
        pending: list[int],
        encoder: Encoder,
    ) -> int:
        """Run the pipeline; returns how many features this process has committed."""
        settings = self.settings
        store_dir = Path(settings.cache_dir) / spec.short_name
        with ExitStack() as stack:
            decoder = stack.enter_context(DecodePool(settings.num_workers, spec.preprocessing))
            claims = stack.enter_context(Claims(store_dir / "claims"))
            bar = stack.enter_context(self.reporter.bar(len(pending), settings.noun))
            observer = RunObserver(bar, self.reporter, self.limits)
            stack.enter_context(self.stop.deferred())
            writer = FeatureWriter(
                lambda: ShardWriter(store_dir, spec, codec=settings.codec),
                feature_dtype=spec.feature_dtype,
                shard_bytes=self.shard_bytes,
                on_commit=lambda blocks: _committed(blocks, table, claims),
                on_written=bar.update,
                on_bad_feature=self._not_stored,
            )
            pipeline = Pipeline(
                plan=plan,
                spec=spec,
                known=known,
                present=present,
                claims=claims,
                decoder=decoder,
                encoder=BatchEncoder(
                    encoder, settings.batch_size, self._halved, feature_dtype=spec.feature_dtype
                ),
                writer=writer,
                failures=self.failures,
                stop=self.stop,
                observer=observer,
            )
            try:
                pipeline.run(set(pending))
            finally:
                self.lost += len(pipeline.failed)
                self.elsewhere = observer.elsewhere
                writer.close()
        return writer.committed

    def _stopped(self, processed: int) -> int:
        name = "SIGINT" if self.stop.signal_number == 2 else "SIGTERM"
        self.reporter.warn(
            f"Stopped by {name}: {count_of(processed, self.settings.noun)} of this run are committed in "
            f"{os.path.abspath(self.settings.cache_dir)}; run the same command again to go on"
        )
        return 128 + self.stop.signal_number

    def _verify(self, plan: Plan, cache: FeatureCache) -> int:
        with tqdm(total=len(plan), desc="Verifying", unit=self.settings.noun, mininterval=1.0) as bar:
            result = verify_data(
                cache,
                plan,
                threads=max(4, self.settings.num_workers),
                on_invalid=lambda label, reason: self.reporter.warn(f"invalid: {label}: {reason}"),
                on_progress=bar.update,
            )
        self.reporter.info(str(result))
        return result.invalid

    def _recompute(self, plan: Plan, cache: FeatureCache, encoder: Encoder) -> bool:
        """Whether a recomputed feature differs by more than rounding can explain."""
        compared, error, label = largest_relative_error(cache, plan, encoder, self.settings.recompute)
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
        self.failures.add(label, reason)

    def _halved(self, batch_size: int) -> None:
        self.reporter.warn(f"out of memory: going on with --batch_size {batch_size}")


def _load(checkpoint: Checkpoint, device: str, compute_dtype: str) -> Encoder:
    try:
        return checkpoint.load(device=device, compute_dtype=compute_dtype)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise out_of_memory(device, "the encoder's weights alone") from error
        raise


def _committed(blocks: list[BlockDone], table: DigestTable, claims: Claims) -> None:
    """A shard is on disk: note the digests first, then give the claims back, so that others find all done."""
    table.append(row for block in blocks for row in block.rows)
    for block in blocks:
        claims.release(block.block_id)

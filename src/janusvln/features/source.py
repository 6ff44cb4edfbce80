"""Where a training step gets its features from. Which way a feature came is not the trainer's business.

requests of a batch ──> hit:  read from the cache
                        miss: `encode` now, `fill` (encode and store), or `error`
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from janusvln.features.fill import CacheFiller
from janusvln.features.live import LiveEncoder
from janusvln.features.read_ahead import PendingRead, ReadAhead
from janusvln.features.request import FeatureRequest
from vggt_cache.context import label_of_last
from vggt_cache.errors import DataError, StoreError
from vggt_cache.store import FeatureCache

MISS_POLICIES = ("encode", "fill", "error")


@dataclass
class Counts:
    """What has happened since the counts were last taken, in this process."""

    hits: int = 0
    misses: int = 0
    batches: int = 0
    wait_s: float = 0.0
    """Of the training step, for features that were still being read."""
    encode_s: float = 0.0


class FeatureSource:
    """The features of one specification. For the training thread."""

    def __init__(
        self,
        *,
        cache: FeatureCache | None,
        reader: ReadAhead | None,
        encoder: LiveEncoder,
        miss: str = "encode",
        filler: CacheFiller | None = None,
        on_hit: Callable[[int], None] | None = None,
    ) -> None:
        """`reader` goes with `cache`, `filler` with miss = "fill"; `on_hit` is told the sample's index."""
        self.cache = cache
        self.counts = Counts()
        self._reader = reader
        self._encoder = encoder
        self._miss = miss
        self._filler = filler
        self._on_hit = on_hit
        self._expected: deque[tuple[Sequence[FeatureRequest], list[PendingRead | None]]] = deque()
        self._in_use: list[PendingRead] = []
        self._warned = False

    def expect(self, requests: Sequence[FeatureRequest]) -> None:
        """These requests come next, after those announced before: begin to read what the cache has of them."""
        self._expected.append((requests, [self._start(request) for request in requests]))

    def take(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        """The features [h, w, C] on the device, valid until `step_done`. Raises VggtCacheError."""
        reads = self._reads_of(requests)
        began_s = time.perf_counter()
        if self._reader is not None:
            self._reader.settle([read for read in reads if read is not None])
        features = [self._arrived(*pair) for pair in zip(requests, reads, strict=True)]
        self.counts.wait_s += time.perf_counter() - began_s
        self.counts.batches += 1
        missing = [position for position, feature in enumerate(features) if feature is None]
        self.counts.hits += len(features) - len(missing)
        self.counts.misses += len(missing)
        if missing:
            computed = self._compute([requests[position] for position in missing])
            for position, feature in zip(missing, computed, strict=True):
                features[position] = feature
        return [feature for feature in features if feature is not None]

    def step_done(self) -> None:
        """The features of all `take`s so far are used up."""
        for read in self._in_use:
            assert self._reader is not None
            self._reader.release(read)
        self._in_use.clear()

    @property
    def not_stored(self) -> int | None:
        """Features that this process has computed so far and could not store; None where it stores none."""
        return None if self._filler is None else self._filler.not_stored

    def take_counts(self) -> Counts:
        """The counts since the last call."""
        counts, self.counts = self.counts, Counts()
        return counts

    def forget(self) -> None:
        """Nothing that was announced will be taken: an epoch ended early."""
        for _, reads in self._expected:
            self._in_use += [read for read in reads if read is not None]
        self._expected.clear()
        self.step_done()

    def flush(self) -> None:
        """Commit what `fill` has computed."""
        if self._filler is not None:
            self._filler.flush()

    def refresh(self) -> None:
        """Take in what has been committed, by this rank and by others. Where that cannot be read, it is computed."""
        if self.cache is None:
            return
        try:
            self.cache.refresh()
        except StoreError as error:
            if self._miss == "error":
                raise
            self._warn_once(error)

    def close(self) -> None:
        """Commit what `fill` has computed, tell what could not be stored, and end all threads."""
        self.forget()
        if self._reader is not None:
            self._reader.close()
        if self._filler is not None:
            self._filler.close()

    # ------------------------------------------------------------ steps

    def _start(self, request: FeatureRequest) -> PendingRead | None:
        if self._reader is None or self.cache is None or request.key not in self.cache:
            return None
        return self._reader.start(request.key, request.grid)

    def _reads_of(self, requests: Sequence[FeatureRequest]) -> list[PendingRead | None]:
        if self._expected and self._expected[0][0] is requests:
            reads = self._expected.popleft()[1]
        else:  # not announced: an evaluation between training steps
            reads = [self._start(request) for request in requests]
        self._in_use += [read for read in reads if read is not None]
        return reads

    def _arrived(self, request: FeatureRequest, read: PendingRead | None) -> torch.Tensor | None:
        if read is None:
            return None
        assert self._reader is not None
        try:
            feature = self._reader.wait(read)
        except StoreError as error:
            if self._miss == "error":
                raise
            self._warn_once(error)
            return None
        if feature is not None and self._on_hit is not None:
            self._on_hit(request.index)
        return feature

    def _compute(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        if self._miss == "error":
            raise _missing(requests[0], self.cache)
        began_s = time.perf_counter()
        features = self._encoder.encode(requests)
        if features[0].is_cuda:
            torch.cuda.synchronize(features[0].device)  # else the time would be counted where the step waits
        self.counts.encode_s += time.perf_counter() - began_s
        if self._filler is not None:
            self._filler.put(requests, features)
        return [self._encoder.as_stored(feature) for feature in features]

    def _warn_once(self, error: StoreError) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a feature cannot be read from the cache and is computed instead, as will be all others of this kind, "
                f"counted as misses: {error}",
                stacklevel=2,
            )


def _missing(request: FeatureRequest, cache: FeatureCache | None) -> DataError:
    return DataError(
        f"the feature of {label_of_last(request.paths)} is not in the cache "
        f"{cache.cache_dir if cache else ''} and --vggt_cache_miss is error: precompute it, or train with "
        "--vggt_cache_miss encode"
    )

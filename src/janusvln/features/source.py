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

from janusvln.data.images import FeatureRequest
from janusvln.features.computed import CacheFiller, LiveEncoder
from vggt_cache.context import label_of_last
from vggt_cache.delivery import PendingRead, ReadAhead
from vggt_cache.errors import DataError, StoreError
from vggt_cache.identity import pixel_key
from vggt_cache.store import FeatureCache

MISS_POLICIES = ("encode", "fill", "error")

Reads = dict[int, PendingRead]
"""Of a batch, by place; none where the key is not in the cache."""


@dataclass
class Counts:
    """What has happened since the counts were last taken, in this process."""

    hits: int = 0
    misses: int = 0
    batches: int = 0
    """Micro-batches."""
    wait_s: float = 0.0
    """Of the training step, for features that were still being read."""
    encode_s: float = 0.0


class FeatureSource:
    """The features of one specification. For the training thread."""

    def __init__(
        self,
        *,
        reader: ReadAhead | None,
        encoder: LiveEncoder,
        miss: str = "encode",
        filler: CacheFiller | None = None,
        on_hit: Callable[[int], None] | None = None,
    ) -> None:
        """`reader`: of the cache, if there is one; `filler` goes with miss = "fill"; `on_hit` gets sample indices."""
        self.cache = None if reader is None else reader.cache
        self.counts = Counts()
        self._reader = reader
        self._encoder = encoder
        self._miss = miss
        self._filler = filler
        self._on_hit = on_hit
        self._expected: deque[tuple[Sequence[FeatureRequest], Reads]] = deque()
        self._in_use: list[PendingRead] = []
        self._warned = False

    def expect(self, requests: Sequence[FeatureRequest]) -> None:
        """These requests come next, after those announced before: begin to read what the cache has of them."""
        self._expected.append((requests, self._start(requests)))

    def take(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        """The features [h, w, C] on the device, valid until `step_done`. Raises VggtCacheError."""
        if self._expected and self._expected[0][0] is requests:
            reads = self._expected.popleft()[1]
        else:  # not announced: an evaluation between training steps
            reads = self._start(requests)
        began_s = time.perf_counter()
        features = self._arrived(requests, reads)
        missing = [at for at in range(len(requests)) if at not in features]
        self.counts.wait_s += time.perf_counter() - began_s
        self.counts.batches += 1
        self.counts.hits += len(features)
        self.counts.misses += len(missing)
        if missing:
            features.update(zip(missing, self._compute([requests[at] for at in missing]), strict=True))
        return [features[at] for at in range(len(requests))]

    def step_done(self) -> None:
        """The features of all `take`s so far are used up."""
        if self._reader is not None:
            for read in self._in_use:
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
            self._in_use += reads.values()
        self._expected.clear()
        self.step_done()

    def flush(self) -> None:
        """Commit what `fill` has computed."""
        if self._filler is not None:
            self._filler.flush()

    def refresh(self) -> None:
        """Take in what has been committed, by this rank and by others. Where that cannot be read, it is computed."""
        try:
            if self.cache is not None:
                self.cache.refresh()
        except StoreError as error:
            self._tolerate(error)

    def close(self) -> None:
        """Commit what `fill` has computed, tell what could not be stored, and end all threads."""
        self.forget()
        if self._reader is not None:
            self._reader.close()
        if self._filler is not None:
            self._filler.close()

    # ------------------------------------------------------------ steps

    def _start(self, requests: Sequence[FeatureRequest]) -> Reads:
        if self._reader is None:
            return {}
        keys = [self._stored_key(one, self._reader.cache) for one in requests]
        return {at: self._reader.start(key) for at, key in enumerate(keys) if key is not None}

    def _stored_key(self, request: FeatureRequest, cache: FeatureCache) -> bytes | None:
        """The key under which the cache has the feature, of its files or of their pixels; None where it has not."""
        if request.key in cache:
            return request.key
        by_pixels = pixel_key(cache.spec, request.pixel_digests)
        return by_pixels if by_pixels in cache else None

    def _arrived(self, requests: Sequence[FeatureRequest], reads: Reads) -> dict[int, torch.Tensor]:
        features: dict[int, torch.Tensor] = {}
        if self._reader is None:
            return features
        self._in_use += reads.values()
        self._reader.settle(list(reads.values()))
        for at, read in reads.items():
            try:
                feature = self._reader.wait(read)
            except StoreError as error:
                self._tolerate(error)
                continue
            if feature is not None:
                features[at] = feature
                if self._on_hit is not None:
                    self._on_hit(requests[at].index)
        return features

    def _compute(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        if self._miss == "error":
            raise DataError(
                f"the feature of {label_of_last(requests[0].paths)} is not in the cache "
                f"{self.cache.cache_dir if self.cache else ''} and --vggt_cache_miss is error: precompute it, or train "
                "with --vggt_cache_miss encode"
            )
        began_s = time.perf_counter()
        features = self._encoder.encode(requests)
        if features[0].is_cuda:
            torch.cuda.synchronize(features[0].device)  # else the time would be counted where the step waits
        self.counts.encode_s += time.perf_counter() - began_s
        if self._filler is not None:
            self._filler.put(requests, features)
        return [self._encoder.as_stored(feature) for feature in features]

    def _tolerate(self, error: StoreError) -> None:
        """One warning, unless features may not be computed."""
        if self._miss == "error":
            raise error
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"a feature cannot be read from the cache and is computed instead, as will be all others of this kind, "
                f"counted as misses: {error}",
                stacklevel=2,
            )

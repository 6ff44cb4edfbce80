"""Features of frames that somebody's own code hands over as pixels: looked up in all stores of a directory, and put."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import torch

from vggt_cache.errors import StoreError
from vggt_cache.identity import FeatureSpec, feature_key, pixel_digest
from vggt_cache.pixels import Pixels, as_levels
from vggt_cache.place import absolute
from vggt_cache.precompute.write import FeatureWriter
from vggt_cache.store import FeatureCache, ShardWriter, create_store, list_stores
from vggt_cache.store.staged import Staging
from vggt_cache.store.writer import shard_bytes

THREADS = 4
"""That hash frames: sha256 releases the interpreter lock, and a frame is enough for one to be worth its while."""


class PixelCache:
    """From pixels to features and back, for one encoder, context and storage dtype. For one thread.

    What was computed from files, in whatever preprocessing, is found where it gave the very same pixels.
    """

    def __init__(
        self,
        cache_dir: str | os.PathLike[str],
        spec: FeatureSpec,
        *,
        fill: bool = False,
        stage: Staging | None = None,
    ) -> None:
        """`spec`: of the features; its preprocessing does not matter. `fill`: make the store for `put`. `stage`: where
        features are kept on this machine, see `FeatureCache.open`.

        Raises CommitError, and without `fill` what `FeatureCache.open` raises where there is no such cache.
        """
        self.spec = spec.of_given_pixels
        self._cache_dir, self._stage = absolute(cache_dir), stage
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="pixel-digest")
        self._writer: FeatureWriter | None = None
        self._put: set[bytes] = set()
        self.lost: list[str] = []
        """Keys (hex) of features that were put and are not stored, as they are not finite."""
        if fill:
            create_store(self._cache_dir, self.spec)
        self.cache = self._open(fill)
        """Of given pixels, or one beside it: all find the same features."""

    def _open(self, fill: bool) -> FeatureCache:
        opened = self.spec
        if not fill:
            with suppress(StoreError):  # which opening tells better
                stores = list_stores(self._cache_dir)
                related = [found for found in stores if found.of_given_pixels == self.spec]
                opened = self.spec if self.spec in related else [*related, self.spec][0]
        return FeatureCache.open(self._cache_dir, spec=opened, stage=self._stage)

    def keys(self, lists: Iterable[torch.Tensor]) -> list[bytes]:
        """The key of each ordered frame list [S, 3, H, W], uint8 or floats in [0, 1], on any device.

        A tensor [B, S, 3, H, W] is such lists. Those frames that the context uses are hashed, all at the same time.
        """
        used: list[list[Pixels]] = []
        for images in lists:
            first, *_ = self.spec.context_rule.used(range(len(images)))
            used.append(as_levels(images[first:]))
        digests = self._pool.map(pixel_digest, [frame for frames in used for frame in frames])
        return [feature_key(self.spec, [next(digests) for _ in frames]) for frames in used]

    def __contains__(self, key: object) -> bool:
        return key in self.cache

    def get(self, key: bytes, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """As `FeatureCache.get_by_key`; to read ahead onto a device, give `cache` to `delivery.ReadAhead`."""
        return self.cache.get_by_key(key, out=out)

    def put(self, keys: Sequence[bytes], features: torch.Tensor) -> None:
        """Store features [len(keys), ...] in the dtype of storage, from any device; each key once.

        They are on disk after `flush`, or when a shard is full or old. Nobody may change the features afterwards.
        Raises StoreErrors, also of what was put before.
        """
        new = [at for at, key in enumerate(keys) if key not in self._put]
        if not new:
            return
        if self._writer is None:
            store_dir = create_store(self._cache_dir, self.spec)
            self._writer = FeatureWriter(
                new_shard=lambda: ShardWriter(store_dir, self.spec),
                feature_dtype=self.spec.feature_dtype,
                shard_bytes=shard_bytes(),
                on_bad_feature=lambda label, reason: self.lost.append(label),
            )
        self._put.update(keys)
        chosen = [keys[at] for at in new]
        self._writer.put(
            chosen, [key.hex() for key in chosen], features if len(new) == len(keys) else features[new]
        )

    def flush(self) -> None:
        """Commit what was put; then it is found, here and by others, as is what they have committed meanwhile."""
        if self._writer is not None:
            self._writer.flush()
        self.cache.refresh()

    def close(self) -> None:
        """Commit what was put, and end the threads."""
        self._pool.shutdown()
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self.cache.close()

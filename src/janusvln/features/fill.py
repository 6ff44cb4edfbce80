"""Features that training had to compute, put into the cache: the first epoch fills it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from janusvln.features.request import FeatureRequest
from vggt_cache.errors import OutOfMemoryError, StoreError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.write import FeatureWriter, shard_bytes
from vggt_cache.store import ShardWriter, create_store

_CANNOT_STORE = (StoreError, OSError, OutOfMemoryError)
"""A full disk, a quota, a mount that is read-only now, a directory that has gone; no memory for what is on its way."""


class CacheFiller:
    """Writes into the store of one specification. Every rank has its own; shards never collide.

    Storing saves later work and training never depends on it: behind the first feature that cannot be written nothing
    more is stored, with one warning, and `not_stored` counts.
    """

    def __init__(
        self,
        cache_dir: str,
        spec: FeatureSpec,
        *,
        warn: Callable[[str], None] = lambda sentence: print(f"[WARN] {sentence}", flush=True),
    ) -> None:
        """Makes the store where there is none yet. Raises CommitError, CacheAccessError; nothing else here does.

        `warn` may be called in another thread.
        """
        store_dir = create_store(cache_dir, spec)
        self._cache_dir = cache_dir
        self._warn = warn
        self._digests = DigestTable(cache_dir)
        self._rows: dict[bytes, bytes] = {}
        self._known: set[bytes] = set()
        self._not_finite = 0
        self._gave_up = False
        self._writer = FeatureWriter(
            new_shard=lambda: ShardWriter(store_dir, spec),
            feature_dtype=spec.feature_dtype,
            shard_bytes=shard_bytes(),
            on_bad_feature=self._on_bad_feature,
        )

    @property
    def not_stored(self) -> int:
        """Features that were handed over and will not be on the disk, as far as is known; each is counted once."""
        return len(self._known) - self._writer.committed if self._gave_up else self._not_finite

    def put(self, requests: Sequence[FeatureRequest], features: Sequence[torch.Tensor]) -> None:
        """Hand over features [h, w, C], each stored once.

        Nobody may change them afterwards: another thread reads them later, on a GPU in another stream.
        """
        for request, feature in zip(requests, features, strict=True):
            if request.key not in self._known:
                self._known.add(request.key)
                self._attempt(partial(self._store, request, feature))

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        self._attempt(self._writer.flush)
        self._attempt(self._save_digests)

    def close(self) -> None:
        """The same, and end the threads. Tells how many features were not stored, if any."""
        self._attempt(self._writer.close)
        self._attempt(self._save_digests)
        if self.not_stored:
            self._warn(
                f"{self.not_stored} of {len(self._known)} features that were computed here are not stored in "
                f"{self._cache_dir}"
            )

    def _attempt(self, step: Callable[[], None]) -> None:
        if self._gave_up:
            return
        try:
            step()
        except _CANNOT_STORE as error:
            self._gave_up = True
            with contextlib.suppress(*_CANNOT_STORE):
                self._writer.close()  # what was to be committed before it still is
            self._warn(
                "from now on features are computed here and not stored, in every epoch again, and training goes on; to "
                f"have them stored, mend this and train or precompute once more: {error}"
            )

    def _store(self, request: FeatureRequest, feature: torch.Tensor) -> None:
        self._writer.put([request.key], [request.paths[-1]], feature.unsqueeze(0))
        self._note(request)

    def _note(self, request: FeatureRequest) -> None:
        """Which images these were, so that planning and coverage need not open them again."""
        rows = zip(request.state_hashes, request.digests, strict=True)
        self._rows.update((state, digest) for state, digest in rows if state)

    def _save_digests(self) -> None:
        rows, self._rows = self._rows, {}
        self._digests.append(rows.items())

    def _on_bad_feature(self, label: str, reason: str) -> None:
        self._not_finite += 1
        self._warn(f"{label}: {reason}")

"""Features that training had to compute, put into the cache: the first epoch fills it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from janusvln.features.request import FeatureRequest
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.write import FeatureWriter, shard_bytes
from vggt_cache.store import ShardWriter, create_store


class CacheFiller:
    """Writes into the store of one specification. Every rank has its own; shards never collide."""

    def __init__(self, cache_dir: str, spec: FeatureSpec) -> None:
        """Makes the store where there is none yet. Raises CommitError, CacheAccessError."""
        store_dir = create_store(cache_dir, spec)
        self._digests = DigestTable(cache_dir)
        self._rows: dict[bytes, bytes] = {}
        self._known: set[bytes] = set()
        self._writer = FeatureWriter(
            lambda: ShardWriter(store_dir, spec),
            feature_dtype=spec.feature_dtype,
            shard_bytes=shard_bytes(),
            on_commit=lambda blocks: None,
            on_written=lambda count: None,
            on_bad_feature=lambda label, reason: print(f"[WARN] {label}: {reason}", flush=True),
        )

    def put(self, requests: Sequence[FeatureRequest], features: Sequence[torch.Tensor]) -> None:
        """Hand over features [h, w, C], each stored once. The caller may change them only on a GPU's stream."""
        for request, feature in zip(requests, features, strict=True):
            if request.key not in self._known:
                self._known.add(request.key)
                self._writer.put([request.key], [request.paths[-1]], feature.unsqueeze(0))
                self._note(request)

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        self._writer.flush()
        self._save_digests()

    def close(self) -> None:
        self._writer.close()
        self._save_digests()

    def _note(self, request: FeatureRequest) -> None:
        """Which images these were, so that planning and coverage need not open them again."""
        rows = zip(request.state_hashes, request.digests, strict=True)
        self._rows.update((state, digest) for state, digest in rows if state)

    def _save_digests(self) -> None:
        rows, self._rows = self._rows, {}
        self._digests.append(rows.items())

"""Which features the store has already, as a run sees it."""

from __future__ import annotations

from vggt_cache.store import FeatureCache

SHARDS_BETWEEN_INDEXES = 64


class Present:
    """Which features the store has already. `recompute` counts only shards that are new since the start."""

    def __init__(self, cache: FeatureCache, *, recompute: bool) -> None:
        self._cache = cache
        self._ignored = frozenset(cache.shard_names()) if recompute else frozenset()
        self._own: set[bytes] = set()
        self._indexed_shards = len(cache.shard_names())

    def __contains__(self, key: bytes) -> bool:
        if key in self._own:
            return True
        if not self._ignored:
            return key in self._cache
        shard = self._cache.shard_of(key)
        return shard is not None and shard not in self._ignored

    def add(self, key: bytes) -> None:
        """This process has handed the feature to its writer."""
        self._own.add(key)

    def refresh(self) -> None:
        """Take in what other processes have committed."""
        self._cache.refresh()
        shards = len(self._cache.shard_names())
        if shards - self._indexed_shards >= SHARDS_BETWEEN_INDEXES:
            # Shards that no index covers are merged anew at each refresh: keep them few.
            self._cache.save_index()
            self._indexed_shards = shards

"""Which of the wanted features a store has: exactly for a few, and in bulk for all that is left to do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

import numpy as np
import numpy.typing as npt

from vggt_cache.errors import SmallFileError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.plan import Indexes
from vggt_cache.small_files import SmallFolder
from vggt_cache.store import FeatureCache
from vggt_cache.store.shards import SHARDS_FOLDER
from vggt_cache.store.siblings import SameTable

SHARDS_BETWEEN_INDEXES = 64


class StoredKeys:
    """What a store has, and what this process has in hand for it. `recompute`: all but the shards in `ignored`."""

    def __init__(self, cache: FeatureCache, *, recompute: bool, ignored: Iterable[str] = ()) -> None:
        self.cache = cache
        self.ignored = frozenset(ignored)
        self._recompute = recompute
        self.own: set[bytes] = set()
        """Keys of what this process has handed to its writer."""

    def __contains__(self, key: bytes) -> bool:
        shard = self.cache.shard_of(key)
        if shard is None:
            return key in self.own or (not self._recompute and key in self.cache)
        return key in self.own or shard not in self.ignored

    def by_pixels(self, key: bytes) -> tuple[bytes, FeatureSpec] | None:
        """Where the feature is, if another store has it by the key of its frames' pixels: the key there, and whose."""
        found = None if self._recompute else self.cache.siblings.find(key, self.cache)
        return None if found is None else (found[1], found[0].spec)


class Stored(StoredKeys):
    """What was there when it was made or refreshed. `recompute` counts only shards that are new since it was made."""

    def __init__(self, known: KnownKeys, cache: FeatureCache, *, recompute: bool) -> None:
        super().__init__(cache, recompute=recompute, ignored=cache.shard_names() if recompute else ())
        self.known = known
        self.same = SameTable(cache.cache_dir)
        self._shards = SmallFolder(os.path.join(cache.cache_dir, cache.spec.short_name, SHARDS_FOLDER))
        self._indexed_shards = len(cache.shard_names())
        features = len(known.plan)
        self._keys = np.zeros((features, 2), np.uint64)
        self._has_key, self._finished = np.zeros(features, np.bool_), np.zeros(features, np.bool_)

    def missing(self, features: Iterable[int]) -> list[int]:
        """Those of the features that are not known to be stored."""
        return [f for f in features if (key := self.known.key(f)) is None or key not in self]

    def all_missing(self) -> list[int]:
        """Those of all wanted features that are not known to be stored."""
        self._find_finished()
        return self.missing(np.flatnonzero(~self._finished).tolist())

    def finished(self, features: Indexes) -> npt.NDArray[np.bool_]:
        """Of many features at once, which were found under their own keys when this was last refreshed [n].

        `missing` may find more: what this process has in hand, and what is stored under the key of the pixels.
        """
        return self._finished[features]

    def shows_others(self, feature: int) -> bool:
        """Whether other processes will find the feature in bulk, once what is in hand here is on the disk."""
        key = self.known.key(feature)
        return key is not None and (key in self.own or self.cache.has_own(key))

    def refresh(self) -> None:
        """Take in what other processes have found and committed."""
        self.known.reload()
        with suppress(SmallFileError):
            self._shards.touch(
                "."
            )  # NFS lists anew what the process itself has changed, all else a minute late
        self.cache.refresh()
        shards = len(self.cache.shard_names())
        if shards - self._indexed_shards >= SHARDS_BETWEEN_INDEXES:
            # Shards that no index covers are merged anew at each refresh: keep them few.
            self.cache.save_index()
            self._indexed_shards = shards
        self._find_finished()

    def _find_finished(self) -> None:
        features, keys = self.known.new_keys()
        self._keys[features], self._has_key[features], self._finished[features] = keys, True, False
        left = np.flatnonzero(self._has_key & ~self._finished)
        self._finished[left] = self.cache.which_are_own(self._keys[left], not_in=self.ignored)

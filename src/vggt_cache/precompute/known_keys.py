"""What is known of features before any image is opened: their keys, by the digests of the states of files."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from vggt_cache.identity import DIGEST_BYTES, FeatureSpec, feature_key
from vggt_cache.precompute.digests import DigestTable, state_hash
from vggt_cache.precompute.plan import Indexes, Plan
from vggt_cache.store.record import key_array
from vggt_cache.store.rows import hash_array


class KnownKeys:
    """Keys of those features whose frames' digests are known without opening an image."""

    def __init__(self, plan: Plan, spec: FeatureSpec, table: DigestTable) -> None:
        self.plan = plan
        self.spec = spec
        self.table = table
        states = ((path, plan.frames.state(frame)) for frame, path in enumerate(plan.frames.paths))
        self._states = hash_array(state_hash(path, state) if state else bytes(16) for path, state in states)
        """For each frame, the hash of its file's present state [frames, 2]; zeros where it is missing."""
        self._known = np.zeros(len(self._states), np.bool_)
        self._read_here = np.zeros(len(self._states), np.bool_)
        self._digests = np.zeros((len(self._states), DIGEST_BYTES), np.uint8)
        self._fresh = np.zeros(len(self._states), np.bool_)
        """Whose digest is new or another one since keys were asked for."""
        self._by_state = np.argsort(self._states[:, 0])
        self._look_up(np.arange(len(self._states)))

    def reload(self) -> None:
        """Take in digests that other processes have found meanwhile."""
        hashes = self.table.reload()
        if len(hashes) and len(self._states):
            first = self._states[self._by_state, 0]
            frames = self._by_state[np.searchsorted(first, hashes[:, 0]).clip(max=len(first) - 1)]
            self._look_up(np.unique(frames[(self._states[frames] == hashes).all(axis=1)]))

    def learn(self, frame: int, digest: bytes) -> None:
        """This process has read the frame itself."""
        value = np.frombuffer(digest, np.uint8)
        self._fresh[frame] |= not self._known[frame] or (self._digests[frame] != value).any()
        self._known[frame] = self._read_here[frame] = True
        self._digests[frame] = value

    def knows(self, frame: int) -> bool:
        return bool(self._known[frame])

    def key(self, feature: int) -> bytes | None:
        """The feature's key, or None while a frame of it has not been read in its present state."""
        frames = self.plan.frames_of(feature)
        if not self._known[frames].all():
            return None
        return feature_key(self.spec, [self._digests[frame].tobytes() for frame in frames])

    def unknown_frames(self, features: Iterable[int]) -> list[int]:
        """Those frames of the features whose files are there and have not been read in their present state."""
        frames = {frame for feature in features for frame in self.plan.frames_of(feature).tolist()}
        return [frame for frame in sorted(frames) if not self._known[frame]]

    def new_keys(self) -> tuple[Indexes, npt.NDArray[np.uint64]]:
        """The features that have got a key, or another one, since the last call; and their keys, see `key_array`."""
        if not self._fresh.any():
            return np.empty(0, np.int64), key_array([])
        features = np.flatnonzero(self.plan.which_use(self._fresh) & ~self.plan.which_use(~self._known))
        self._fresh[:] = False
        return features, key_array([key for f in features.tolist() if (key := self.key(f)) is not None])

    def _look_up(self, frames: Indexes) -> None:
        known, digests = self.table.lookup(self._states[frames])
        fresh = known & self._states[frames].any(axis=1) & ~self._read_here[frames]
        frames, digests = frames[fresh], digests[fresh]
        self._fresh[frames] |= ~self._known[frames] | (self._digests[frames] != digests).any(axis=1)
        self._known[frames] = True
        self._digests[frames] = digests

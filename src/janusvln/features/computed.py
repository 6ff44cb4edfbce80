"""Features computed while training, where the cache has them not; put into it where the first epoch fills it.

The encoder is no part of the trained module. It is loaded when it is first needed, runs outside the
engine and takes part in no collective, so a rank that computes keeps nobody waiting but itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from janusvln.data.images import FeatureRequest
from vggt_cache.codec.quantise import as_stored
from vggt_cache.encoder import Encoder
from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.errors import CheckpointError, OutOfMemoryError, SettingsError, StoreError
from vggt_cache.identity import FeatureSpec, pixel_key
from vggt_cache.pixels import Pixels
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.write import FeatureWriter
from vggt_cache.store import ShardWriter, create_store
from vggt_cache.store.siblings import SameTable
from vggt_cache.store.writer import shard_bytes

MOST_TOGETHER = 12
"""Frames encoded together: lists of nine, the published length, in one go. Halved when the device is out of memory."""
_CANNOT_STORE = (StoreError, OSError, OutOfMemoryError)
"""A full disk, a quota, a mount that is read-only now, a directory that has gone; no memory for what is on its way."""


class LiveEncoder:
    """The encoder of one specification, loaded on first need."""

    def __init__(
        self, location: str | None, spec: FeatureSpec, device: torch.device, *, encoder: Encoder | None = None
    ) -> None:
        """`encoder`: one that is in memory already, in place of the checkpoint at `location`."""
        self._location = location
        self._spec = spec
        self._device = device
        self._most_together = MOST_TOGETHER
        self._checkpoint: Checkpoint | None = None
        self._encoder = None if encoder is None else self._batched(encoder)

    def encode(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        """The features [h, w, C] of these requests, in the dtype of storage, on the device.

        Raises CheckpointError and SettingsError where there is no such encoder.
        """
        if self._encoder is None:
            compute_dtype = self._spec.encoder.compute_dtype
            encoder = self.check().load(device=self._device, compute_dtype=compute_dtype)
            self._encoder = self._batched(encoder)
        # As many go together as make equal parts, without a straggler.
        frames = max(len(requests), *(len(request.digests) for request in requests))
        parts = -(-frames // self._most_together)
        self._encoder.batch_size = -(-frames // parts)
        # Equal frames get one number, so that lists of the batch share their common beginnings.
        numbers: dict[bytes, int] = {}
        images: dict[int, Pixels] = {}
        lists: list[list[int]] = []
        for request in requests:
            lists.append([numbers.setdefault(digest, len(numbers)) for digest in request.digests])
            images.update(zip(lists[-1], (frame.numpy() for frame in request.frames_used), strict=True))
        features: dict[int, torch.Tensor] = {}
        with torch.no_grad():
            for positions, batch in self._spec.context_rule.encode(self._encoder, lists, images):
                features.update(zip(positions, batch, strict=True))
        return [features[position] for position in range(len(requests))]

    def as_stored(self, feature: torch.Tensor) -> torch.Tensor:
        """A computed feature [h, w, C] as it would come back from the cache."""
        return as_stored(feature, self._spec.feature_dtype)

    def check(self) -> Checkpoint:
        """Open the checkpoint, whose weights are not loaded yet. Errors as of `encode`."""
        if self._checkpoint is None:
            self._checkpoint = self._opened()
        return self._checkpoint

    def _opened(self) -> Checkpoint:
        spec = self._spec.encoder
        if self._location is None:
            raise CheckpointError(
                "a feature is not in the cache and --vggt_model_path is not given, so it cannot be computed: "
                "give the path of VGGT, or precompute the missing features"
            )
        checkpoint = Checkpoint.open(self._location, layer=spec.layer)
        if checkpoint.spec(spec.compute_dtype) != spec:
            raise SettingsError(
                f"--vggt_model_path {checkpoint.location} holds another encoder (weights "
                f"{checkpoint.weights_digest()[:16]}) than the one the cache was made with (weights "
                f"{spec.weights_digest[:16]}), so features computed now would not go with those in the cache: "
                "give the same VGGT, or precompute into a new directory"
            )
        return checkpoint

    def _batched(self, encoder: Encoder) -> BatchEncoder:
        return BatchEncoder(
            encoder, self._most_together, self._halved, feature_dtype=self._spec.feature_dtype
        )

    def _halved(self, batch_size: int) -> None:
        self._most_together = batch_size


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
        self._spec = spec
        self._same_table = SameTable(cache_dir)
        self._same: list[tuple[bytes, bytes, FeatureSpec]] = []
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
                self._attempt(self._store, request, feature)

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        self._attempt(self._commit, self._writer.flush)

    def close(self) -> None:
        """The same, and end the threads. Tells how many features were not stored, if any."""
        self._attempt(self._commit, self._writer.close)
        if self.not_stored:
            self._warn(
                f"{self.not_stored} of {len(self._known)} features that were computed here are not stored in "
                f"{self._cache_dir}"
            )

    def _attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        if self._gave_up:
            return
        try:
            step(*arguments)
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
        # Which images these were, so that planning and coverage need not open them again.
        rows = zip(request.state_hashes, request.digests, strict=True)
        self._rows.update((state, digest) for state, digest in rows if state)
        self._same.append((pixel_key(self._spec, request.pixel_digests), request.key, self._spec))

    def _commit(self, finish: Callable[[], None]) -> None:
        finish()
        rows, self._rows = self._rows, {}
        self._digests.append(rows.items())
        same, self._same = self._same, []
        self._same_table.note(same)

    def _on_bad_feature(self, label: str, reason: str) -> None:
        self._not_finite += 1
        self._warn(f"{label}: {reason}")

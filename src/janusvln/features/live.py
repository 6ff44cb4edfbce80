"""Features computed while training: where the cache has them not, or where there is no cache.

The encoder is no part of the trained module. It is loaded when it is first needed, runs outside the
engine and takes part in no collective, so a rank that computes keeps nobody waiting but itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from janusvln.features.request import FeatureRequest
from vggt_cache.codec.quantise import decode_int8, quantised
from vggt_cache.encoder import Encoder
from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.errors import CheckpointError, SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.encode import BatchEncoder, Encoded, Pixels

MOST_TOGETHER = 12
"""Frames encoded together: lists of nine, the published length, in one go. Halved when the device is out of memory."""


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
        self._encoder = None if encoder is None else self._batched(encoder)

    def encode(self, requests: Sequence[FeatureRequest]) -> list[torch.Tensor]:
        """The features [h, w, C] of these requests, in the dtype of storage, on the device.

        Raises CheckpointError and SettingsError where there is no such encoder.
        """
        encoder = self._loaded()
        longest = max(len(request.digests) for request in requests)
        encoder.batch_size = even_share(max(longest, len(requests)), self._most_together)
        features: list[torch.Tensor] = [torch.empty(0)] * len(requests)
        with torch.no_grad():
            for positions, batch in self._batches(encoder, requests):
                for position, feature in zip(positions, batch, strict=True):
                    features[position] = feature
        return features

    def as_stored(self, feature: torch.Tensor) -> torch.Tensor:
        """A computed feature [h, w, C] as it would come back from the cache: a lossy storage dtype changes it.

        One that is not finite is never stored, and stays as it is. Nothing waits for the device.
        """
        if self._spec.feature_dtype != "int8":
            return feature
        tokens = feature.flatten(0, 1)
        record, finite = quantised(tokens)
        return torch.where(finite, decode_int8(record, *tokens.shape), tokens).view(feature.shape)

    def _batches(self, encoder: BatchEncoder, requests: Sequence[FeatureRequest]) -> Iterator[Encoded]:
        # Equal frames get one number, so that lists of the batch share their common beginnings.
        numbers: dict[bytes, int] = {}
        images: dict[int, Pixels] = {}
        lists: list[list[int]] = []
        for request in requests:
            lists.append([numbers.setdefault(digest, len(numbers)) for digest in request.digests])
            images.update(zip(lists[-1], (frame.numpy() for frame in request.frames_used), strict=True))
        return self._spec.context_rule.encode(encoder, lists, images)

    def _loaded(self) -> BatchEncoder:
        if self._encoder is None:
            if self._location is None:
                raise CheckpointError(
                    "a feature is not in the cache and --vggt_model_path is not given, so it cannot be computed: "
                    "give the path of VGGT, or precompute the missing features"
                )
            checkpoint = Checkpoint.open(self._location, layer=self._spec.encoder.layer)
            check_weights(checkpoint, self._spec)
            encoder = checkpoint.load(device=self._device, compute_dtype=self._spec.encoder.compute_dtype)
            self._encoder = self._batched(encoder)
        return self._encoder

    def _batched(self, encoder: Encoder) -> BatchEncoder:
        return BatchEncoder(
            encoder, self._most_together, self._halved, feature_dtype=self._spec.feature_dtype
        )

    def _halved(self, batch_size: int) -> None:
        self._most_together = batch_size


def even_share(frames: int, most: int) -> int:
    """How many frames go together, `most` at the most, so that all go in equal parts without a straggler."""
    parts = -(-frames // most)
    return -(-frames // parts)


def check_weights(checkpoint: Checkpoint, spec: FeatureSpec) -> None:
    """Raises SettingsError where the checkpoint is not the encoder that the cache was made with."""
    if checkpoint.spec(spec.encoder.compute_dtype) != spec.encoder:
        raise SettingsError(
            f"--vggt_model_path {checkpoint.location} holds another encoder (weights "
            f"{checkpoint.weights_digest()[:16]}) than the one the cache was made with (weights "
            f"{spec.encoder.weights_digest[:16]}), so features computed now would not go with those in the cache: "
            "give the same VGGT, or precompute into a new directory"
        )

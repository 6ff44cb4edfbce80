"""What travels through the DataLoader instead of features and normalised images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from vggt_cache.identity import PATCH_SIZE


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """The feature that one sample needs, by its identity, and the frames that the sample shows.

    The frames are uint8, an eighth of Qwen's pixel values: from them the training process makes the model's images, and
    the feature too where the cache has it not.
    """

    index: int
    """Of the sample in the data set."""
    key: bytes
    """16 bytes, see `vggt_cache.identity.feature_key`."""
    paths: tuple[str, ...]
    """Image files that the feature depends on, in order."""
    digests: tuple[bytes, ...]
    """sha256 of the bytes that were decoded, in the same order."""
    state_hashes: tuple[bytes, ...]
    """Of the files that had these bytes, in the same order; empty where the file was changing."""
    frames: torch.Tensor
    """uint8 [n, H, W, 3], all frames of the sample in order, H and W multiples of 14."""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches, of every frame and of the feature"""
        _, height, width, _ = self.frames.shape
        return height // PATCH_SIZE, width // PATCH_SIZE

    @property
    def frames_used(self) -> torch.Tensor:
        """Those that the feature depends on."""
        return self.frames[-len(self.digests) :]

    def pin_memory(self) -> FeatureRequest:
        """For the DataLoader's thread that pins what the workers send."""
        return dataclasses.replace(self, frames=self.frames.pin_memory())

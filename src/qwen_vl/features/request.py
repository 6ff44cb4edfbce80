"""What travels through the DataLoader instead of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """The feature that one sample needs: its identity, and what to compute it from where the cache has it not."""

    index: int
    """Of the sample in the data set."""
    key: bytes
    """16 bytes, see `vggt_cache.identity.feature_key`."""
    paths: tuple[str, ...]
    """Image files in order; in `frame` context the last one alone."""
    digests: tuple[bytes, ...]
    """sha256 of the bytes that were decoded, in the same order."""
    grid: tuple[int, int]
    """(h, w) in patches"""
    frames: torch.Tensor | None
    """uint8 [n, H, W, 3], the pixels behind `digests`; None where the worker found the key in the cache."""

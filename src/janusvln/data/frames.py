"""The frames of one sample: each file read once, its bytes both digested and decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from janusvln.data.errors import UnfitSampleError
from janusvln.data.pixels import Pixels
from janusvln.features.request import FeatureRequest
from vggt_cache.errors import FrameError
from vggt_cache.frames import decode_frame
from vggt_cache.identity import PATCH_SIZE, FeatureSpec, Preprocessing, feature_key, frame_digest
from vggt_cache.precompute.digests import read_in_state
from vggt_cache.samples import Sample, locate_frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One image file as it was read."""

    path: str
    digest: bytes
    """sha256 of the bytes that `pixels` were decoded from"""
    state_hash: bytes
    """of the file that had them, see `vggt_cache.precompute.digests.read_in_state`; may be empty"""
    pixels: Pixels
    """uint8 [H, W, 3], multiples of 14"""

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) in patches"""
        return self.pixels.shape[0] // PATCH_SIZE, self.pixels.shape[1] // PATCH_SIZE


def load_frames(sample: Sample, preprocessing: Preprocessing) -> list[Frame]:
    """A sample's frames in order, all of one size. A path that is named twice is read once, and is one object.

    Raises UnfitSampleError for a file that cannot be read or decoded, and for frames of different sizes.
    """
    loaded: dict[str, Frame] = {}
    frames = []
    for name in sample.frames:
        path, _ = locate_frame(sample.bases, name)
        if path not in loaded:
            loaded[path] = _load(path, preprocessing)
        frames.append(loaded[path])
    grids = sorted({frame.grid for frame in frames})
    if len(grids) > 1:
        (h, w), (other_h, other_w) = grids[:2]
        raise UnfitSampleError(
            f"has frames of different sizes ({h}x{w} and {other_h}x{other_w} patches), and the current frame's feature "
            "is added to every frame, position by position: give the frames of a sample one size"
        )
    return frames


def _load(path: str, preprocessing: Preprocessing) -> Frame:
    try:
        data, state = read_in_state(path)
    except FrameError as error:
        raise UnfitSampleError(f"needs a frame that cannot be used: {error}") from error
    try:
        pixels = decode_frame(data, preprocessing)
    except FrameError as error:
        raise UnfitSampleError(f"needs a frame that cannot be used: {path}: {error}") from error
    return Frame(path=path, digest=frame_digest(data), state_hash=state, pixels=pixels)


def request_feature(index: int, frames: Sequence[Frame], spec: FeatureSpec) -> FeatureRequest:
    """What the training process needs to find, or to compute, the feature of a sample's frames."""
    used = spec.context_rule.used(frames)
    digests = tuple(frame.digest for frame in used)
    return FeatureRequest(
        index=index,
        key=feature_key(spec, digests),
        paths=tuple(frame.path for frame in used),
        digests=digests,
        state_hashes=tuple(frame.state_hash for frame in used),
        frames=torch.from_numpy(np.stack([frame.pixels for frame in frames])),
    )

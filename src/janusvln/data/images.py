"""The images of one sample: each file read once, its bytes digested for the feature's key and decoded for the model.

Qwen's pixel values come from the frames that VGGT sees, cut to an even patch grid at the right and the bottom.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.data.dialogue import UnfitSampleError
from vggt_cache.errors import FrameError, SettingsError, errors_as
from vggt_cache.frames import decode_frame
from vggt_cache.identity import (
    PATCH_SIZE,
    FeatureSpec,
    Preprocessing,
    feature_key,
    frame_digest,
    pixel_digest,
)
from vggt_cache.precompute.digests import read_in_state
from vggt_cache.precompute.settings import QwenLimits
from vggt_cache.samples import Sample, locate_frame

_LEVELS = 256
_CHANNELS = 3

Pixels = npt.NDArray[np.uint8]
Grid = tuple[int, int]


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


@dataclass(frozen=True, kw_only=True)
class FeatureRequest:
    """What travels through the DataLoader instead of a feature and normalised images.

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
    frames: Tensor
    """uint8 [n, H, W, 3], all frames of the sample in order, H and W multiples of 14."""

    @property
    def grid(self) -> Grid:
        """(h, w) in patches, of every frame and of the feature"""
        _, height, width, _ = self.frames.shape
        return height // PATCH_SIZE, width // PATCH_SIZE

    @property
    def frames_used(self) -> Tensor:
        """Those that the feature depends on."""
        return self.frames[-len(self.digests) :]

    @cached_property
    def pixel_digests(self) -> tuple[bytes, ...]:
        """Of `frames_used`: they lead to a feature that was stored for the same pixels from elsewhere."""
        return tuple(pixel_digest(frame.numpy()) for frame in self.frames_used)

    def pin_memory(self) -> FeatureRequest:
        """For the DataLoader's thread that pins what the workers send."""
        return dataclasses.replace(self, frames=self.frames.pin_memory())


def load_frames(sample: Sample, preprocessing: Preprocessing) -> list[Frame]:
    """A sample's frames in order, all of one size. A path that is named twice is read once, and is one object.

    Raises UnfitSampleError for a file that cannot be read or decoded, and for frames of different sizes.
    """
    paths = [locate_frame(sample.bases, name)[0] for name in sample.frames]
    loaded = {path: _load(path, preprocessing) for path in dict.fromkeys(paths)}
    grids = sorted({_grid(frame.pixels) for frame in loaded.values()})
    if len(grids) > 1:
        (h, w), (other_h, other_w) = grids[:2]
        raise UnfitSampleError(
            f"has frames of different sizes ({h}x{w} and {other_h}x{other_w} patches), and the current frame's feature "
            "is added to every frame, position by position: give the frames of a sample one size"
        )
    return [loaded[path] for path in paths]


def _load(path: str, preprocessing: Preprocessing) -> Frame:
    place = ""
    try:
        data, state = read_in_state(path)
        place = f"{path}: "  # which decoding does not know
        pixels = decode_frame(data, preprocessing)
    except FrameError as error:
        raise UnfitSampleError(f"needs a frame that cannot be used: {place}{error}") from error
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


class QwenPixels:
    """What transformers' Qwen2VLImageProcessor makes of images that it need not resize, on any device.

    The processor is asked once what it makes of each of the 256 values of a channel; after that, rescaling and
    normalising are a table. So mean, std and rounding are the processor's own.
    """

    def __init__(
        self, model_dir: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        """With the settings of a Qwen2.5-VL directory; limits given here count before its own.

        Raises SettingsError for a directory without them, another patch size, or limits that contradict each other.
        """
        fault = f"{model_dir} has no preprocessor_config.json that can be read"
        remedy = ": give the directory of a Qwen2.5-VL model"
        with errors_as(SettingsError, fault, remedy, OSError, ValueError):
            # By name, and not by AutoImageProcessor: that takes torchvision's where it is installed, whose values may
            # be rounded otherwise, and older versions of transformers refuse to go without.
            processor: Any = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
        if processor.patch_size != PATCH_SIZE:
            raise SettingsError(
                f"the model's processor works on patches of {processor.patch_size} pixels, VGGT on {PATCH_SIZE}: their "
                "grids do not match; use a Qwen2.5-VL model"
            )
        least = processor.size["shortest_edge"] if min_pixels is None else min_pixels
        most = processor.size["longest_edge"] if max_pixels is None else max_pixels
        if least > most:
            raise SettingsError(f"min_pixels is {least} and max_pixels {most}: no image is between them")
        self._merge_size = int(processor.merge_size)
        self._repeats = int(processor.temporal_patch_size)
        self.limits = QwenLimits(merge_size=self._merge_size, min_pixels=least, max_pixels=most)
        self._table = _values_of_levels(processor)

    def on(self, device: torch.device) -> QwenPixels:
        """The same with its table on a device. This one stays on the CPU, where a DataLoader's workers receive it."""
        moved = copy.copy(self)
        moved._table = self._table.to(device)
        return moved

    def grid(self, frame: Pixels) -> Grid:
        """Patches (h, w), both even, that are left of a frame [H, W, 3]. Raises UnfitSampleError."""
        if complaint := self.limits.complaint(_grid(frame)):
            raise UnfitSampleError(f"does not suit the model: {complaint}")
        return _grid(frame, self._merge_size)

    def image_tokens(self, grid: Grid) -> int:
        """Tokens that an image of this even grid takes in the prompt."""
        return grid[0] * grid[1] // self._merge_size**2

    def values(self, frames: Tensor) -> Tensor:
        """float32 [patches of all frames, 3*2*14*14] of frames uint8 [n, H, W, 3], in Qwen's patch order.

        Groups of 2x2 patches row by row, inside a group row by row. Computed on the frames' device; that of `on`, if
        time matters.
        """
        (h, w), m, p = _grid(frames[0], self._merge_size), self._merge_size, PATCH_SIZE
        cut = frames[:, : h * p, : w * p].reshape(len(frames), h // m, m, p, w // m, m, p, _CHANNELS)
        patches = cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, _CHANNELS, p * p)
        channels = torch.arange(_CHANNELS, device=frames.device)[:, None]
        values = self._table.to(frames.device)[channels, patches.int()]
        return values[:, :, None].expand(-1, -1, self._repeats, -1).reshape(len(patches), -1)


def _grid(frame: Pixels | Tensor, merge_size: int = 1) -> Grid:
    """(h, w) in patches of a frame [H, W, 3], both multiples of `merge_size`."""
    h, w = (side // PATCH_SIZE // merge_size * merge_size for side in frame.shape[:2])
    return h, w


def _values_of_levels(processor: Any) -> Tensor:
    """float32 [3, 256]: what the processor makes of each value that a channel of a pixel can have."""
    side = PATCH_SIZE * processor.merge_size
    images = [np.full((side, side, _CHANNELS), level, np.uint8) for level in range(_LEVELS)]
    made = processor(images, do_resize=False, input_data_format="channels_last", return_tensors="pt")
    values: Tensor = made["pixel_values"].float().reshape(_LEVELS, processor.merge_size**2, _CHANNELS, -1)
    return values[:, 0, :, 0].T.contiguous()

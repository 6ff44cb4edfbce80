"""Qwen's pixel values from the frames that VGGT sees, cut to an even patch grid at the right and the bottom."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.data.errors import UnfitSampleError
from vggt_cache.errors import SettingsError
from vggt_cache.identity import PATCH_SIZE
from vggt_cache.precompute.settings import QwenLimits

_LEVELS = 256
_CHANNELS = 3

Pixels = npt.NDArray[np.uint8]
Grid = tuple[int, int]


class QwenPixels:
    """What transformers' Qwen2VLImageProcessor makes of images that it need not resize, on any device.

    The processor is asked once what it makes of each of the 256 values of a channel; after that, rescaling and
    normalising are a table. So mean, std and rounding are the processor's own.
    """

    def __init__(
        self, processor: Any, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        """Raises SettingsError for a processor of another patch size, or limits that contradict each other."""
        if processor.patch_size != PATCH_SIZE:
            raise SettingsError(
                f"the model's processor works on patches of {processor.patch_size} pixels, VGGT on {PATCH_SIZE}: their "
                "grids do not match; use a Qwen2.5-VL model"
            )
        self.merge_size = int(processor.merge_size)
        self._repeats = int(processor.temporal_patch_size)
        least = processor.size["shortest_edge"] if min_pixels is None else min_pixels
        most = processor.size["longest_edge"] if max_pixels is None else max_pixels
        if least > most:
            raise SettingsError(f"min_pixels is {least} and max_pixels {most}: no image is between them")
        self._limits = QwenLimits(merge_size=self.merge_size, min_pixels=least, max_pixels=most)
        self._table = _values_of_levels(processor)

    @classmethod
    def read(
        cls, model_dir: str, *, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> QwenPixels:
        """With the settings of a Qwen2.5-VL directory; limits given here count before its own."""
        try:
            # By name, and not by AutoImageProcessor: that takes torchvision's where it is installed, whose values may
            # be rounded otherwise, and older versions of transformers refuse to go without.
            processor: Any = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{model_dir} has no preprocessor_config.json that can be read ({' '.join(str(error).split())[:200]}): "
                "give the directory of a Qwen2.5-VL model"
            ) from error
        return cls(processor, min_pixels=min_pixels, max_pixels=max_pixels)

    def on(self, device: torch.device) -> QwenPixels:
        """The same with its table on a device. This one stays on the CPU, where a DataLoader's workers receive it."""
        moved = copy.copy(self)
        moved._table = self._table.to(device)
        return moved

    def grid(self, frame: Pixels) -> Grid:
        """Patches (h, w), both even, that are left of a frame [H, W, 3]. Raises UnfitSampleError."""
        patches = frame.shape[0] // PATCH_SIZE, frame.shape[1] // PATCH_SIZE
        if complaint := self._limits.complaint(patches):
            raise UnfitSampleError(f"does not suit the model: {complaint}")
        return self._even(frame.shape)

    def image_tokens(self, grid: Grid) -> int:
        """Tokens that an image of this even grid takes in the prompt."""
        return grid[0] * grid[1] // self.merge_size**2

    def values(self, frames: Tensor) -> Tensor:
        """float32 [patches of all frames, 3*2*14*14] of frames uint8 [n, H, W, 3], in Qwen's patch order.

        Computed on the frames' device; that of `on`, if time matters.
        """
        patches = self._patches(frames)
        channels = torch.arange(_CHANNELS, device=frames.device)[:, None]
        values = self._table.to(frames.device)[channels, patches.int()]
        return values[:, :, None].expand(-1, -1, self._repeats, -1).reshape(len(patches), -1)

    def _patches(self, frames: Tensor) -> Tensor:
        """uint8 [patches, 3, 14*14]: groups of 2x2 patches row by row, inside a group row by row."""
        (h, w), m, p = self._even(frames.shape[1:]), self.merge_size, PATCH_SIZE
        cut = frames[:, : h * p, : w * p].reshape(len(frames), h // m, m, p, w // m, m, p, _CHANNELS)
        return cut.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, _CHANNELS, p * p)

    def _even(self, size: Sequence[int]) -> Grid:
        h, w = (side // PATCH_SIZE // self.merge_size * self.merge_size for side in size[:2])
        return h, w


def _values_of_levels(processor: Any) -> Tensor:
    """float32 [3, 256]: what the processor makes of each value that a channel of a pixel can have."""
    side = PATCH_SIZE * processor.merge_size
    images = [np.full((side, side, _CHANNELS), level, np.uint8) for level in range(_LEVELS)]
    made = processor(images, do_resize=False, input_data_format="channels_last", return_tensors="pt")
    values: Tensor = made["pixel_values"].float().reshape(_LEVELS, processor.merge_size**2, _CHANNELS, -1)
    return values[:, 0, :, 0].T.contiguous()

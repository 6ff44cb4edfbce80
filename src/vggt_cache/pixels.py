"""Frames in memory as the pixels that the encoder sees, and their digests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from vggt_cache.errors import SettingsError
from vggt_cache.frames import decode_frame, image_pixels
from vggt_cache.identity import GIVEN_PIXELS, Preprocessing

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.float32]
"""[H, W, 3], contiguous: uint8, or float32 in [0, 1] where a value is not k / 255."""


def pixels_of(frame: Any, preprocessing: Preprocessing) -> Pixels:
    """Of one frame: a file's bytes or a PIL image, which are preprocessed; or pixels, which are taken as they are.

    Pixels are arrays or tensors, [H, W, 3] or [3, H, W], uint8 or floats in [0, 1]. Raises FrameError, SettingsError.
    """
    if isinstance(frame, Image.Image):
        return image_pixels(frame, preprocessing)
    if isinstance(frame, bytes):
        if preprocessing == GIVEN_PIXELS:
            raise SettingsError(
                "a frame is given as a file, and this cache holds features of pixels that were given, so how files "
                "become pixels is not known: give pixels, or open the cache that was made from files"
            )
        return decode_frame(frame, preprocessing)
    if not isinstance(frame, (np.ndarray, Tensor)):
        raise SettingsError(
            f"a frame is of type {type(frame).__name__}, and the path of an image file is needed, or the bytes of one "
            "as they lie in the file; or a PIL image, or pixels (an array or tensor)"
        )
    tensor = torch.from_numpy(np.array(frame)) if isinstance(frame, np.ndarray) else frame
    shape = list(tensor.shape)
    if (
        tensor.ndim != 3
        or 3 not in (shape[0], shape[2])
        or not (tensor.dtype == torch.uint8 or tensor.is_floating_point())
    ):
        raise SettingsError(
            f"a frame is a tensor {shape} of {tensor.dtype}, and pixels are [3, H, W] or [H, W, 3], uint8 or floats "
            "in [0, 1]: give them as the encoder is to see them"
        )
    return as_levels((tensor if shape[0] == 3 else tensor.permute(2, 0, 1))[None])[0]


def as_levels(images: Tensor) -> list[Pixels]:
    """The pixels of each of `images` [S, 3, H, W] on any device, uint8 or floats.

    Floats become uint8 k where all values of a frame are float32(k) / 255, the division that torchvision's ToTensor
    does; such frames are the same pixels. Other frames stay as they are, in float32. Where the images lie on a GPU,
    a quarter of their bytes is copied.
    """
    images = images.detach()
    if images.dtype == torch.uint8:
        return list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    exact = images.float()
    levels = (exact * 255).round_().clamp_(0, 255)
    # Divided by a tensor: by a number, CUDA multiplies with the reciprocal, which rounds otherwise.
    same = (levels / torch.tensor(255.0, device=images.device) == exact).flatten(1).all(1).tolist()
    bytes_ = levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [
        bytes_[at] if is_same else exact[at].permute(1, 2, 0).contiguous().cpu().numpy()
        for at, is_same in enumerate(same)
    ]

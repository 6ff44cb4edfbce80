"""One walk: the frames seen so far, and what VGGT remembers of them."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from janusvln.model.streaming import StreamingFeatures
from vggt_cache.errors import FrameError
from vggt_cache.frames import decode_frame
from vggt_cache.identity import Preprocessing
from vggt_cache.samples import history_indexes

Frame = bytes | npt.NDArray[np.uint8]
"""An image file's bytes, or pixels uint8 [H, W, 3] (RGB) of any size."""


class Episode:
    """Made by `Navigator.start`. Seeing and answering are two steps, so that an answer may be asked for again."""

    def __init__(self, instruction: str, stream: StreamingFeatures, preprocessing: Preprocessing) -> None:
        self.instruction = instruction
        self.frames: list[Tensor] = []
        """uint8 [H, W, 3], as the encoder saw them, on the CPU"""
        self.feature: Tensor | None = None
        """[h, w, C] of the latest frame"""
        self._stream = stream
        self._preprocessing = preprocessing

    def see(self, frame: Frame) -> None:
        """Take in the next frame; all have one size. Raises FrameError, and then the episode is as it was."""
        pixels = torch.from_numpy(decode_frame(_file_of(frame), self._preprocessing))
        if self.frames and pixels.shape != self.frames[0].shape:
            (height, width), (first_height, first_width) = pixels.shape[:2], self.frames[0].shape[:2]
            raise FrameError(
                f"the frame becomes {width} x {height} pixels, and the episode's first became {first_width} x "
                f"{first_height}: the frames of an episode have one size; begin another episode"
            )
        with torch.inference_mode():
            self.feature = self._stream.push(pixels)
        self.frames.append(pixels)

    def shown(self, most: int) -> list[Tensor]:
        """Up to `most` frames from the first to the latest, evenly spaced, as JanusVLN samples them."""
        return [self.frames[index] for index in history_indexes(len(self.frames) - 1, most)]


def _file_of(frame: Frame) -> bytes:
    """Pixels become a file, losslessly, so that all frames go one way."""
    if isinstance(frame, bytes):
        return frame
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        raise FrameError(
            f"a frame is uint8 [height, width, 3] (RGB) or the bytes of an image file, not {frame.dtype} "
            f"{list(frame.shape)}: convert it"
        )
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(frame)).save(file, "BMP")
    return file.getvalue()

"""Features while an episode runs: each new frame sees the first and the latest of the frames before it.

As JanusVLN evaluates: after each frame, the cache of earlier frames is trimmed to the first 8 and the last 48. The
kept caches were computed with the history of their own time, so this is not the feature of the kept frames as a list.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vggt_cache.encoder.model import Encoder, FrameCache, patch_grid
from vggt_cache.errors import SettingsError
from vggt_cache.identity import CONTEXTS

FIRST_FRAMES = 8
LATEST_FRAMES = 48


class StreamingFeatures:
    """Features of one episode at a time. Holds at most 56 frames' keys and values beside the encoder.

    context: what the model was trained with. `causal`: a frame sees earlier ones; `frame`: itself alone.
    """

    def __init__(self, encoder: Encoder, *, context: str = "causal") -> None:
        if context not in CONTEXTS:
            raise SettingsError(
                f"context is {context!r}, which is none of {', '.join(CONTEXTS)}: choose the one that the model was "
                "trained with (feature_spec in its config.json)"
            )
        self._encoder = encoder
        self._context = context
        self._caches: list[FrameCache] = []

    def reset(self) -> None:
        """A new episode begins."""
        self._caches = []

    def push(self, frame: Tensor) -> Tensor:
        """The feature [h, w, C] in float32, on the encoder's device, of the episode's next frame.

        frame: uint8 [H, W, 3], sides multiples of 14. To be called once per frame. Raises FrameError when the
        frame has another grid than an earlier one; the episode may then go on with a fitting frame.
        """
        pixels = frame[None]
        causal = self._context == "causal"
        with torch.no_grad():
            features, caches = self._encoder.extend(
                self._encoder.patch_tokens(pixels),
                patch_grid(pixels),
                [self._caches],
                want_feature=[True],
                want_cache=[causal],
            )
        assert features is not None
        self._caches = trimmed([*self._caches, *(cache for cache in caches if cache is not None)])
        return features[0]


def trimmed(caches: list[FrameCache]) -> list[FrameCache]:
    """The first 8 and the last 48."""
    if len(caches) <= FIRST_FRAMES + LATEST_FRAMES:
        return caches
    return caches[:FIRST_FRAMES] + caches[-LATEST_FRAMES:]


def generate_from_frames(
    model: Any, stream: StreamingFeatures, frames: Iterable[Tensor], **inputs: Any
) -> Any:
    """`model.generate(**inputs)` for one prompt, with the feature of the last of `frames`.

    frames: those that `stream` has not seen yet, oldest first, each uint8 [H, W, 3]: in an episode the current one,
    after `stream.reset()` a whole list. inputs: input_ids, pixel_values, image_grid_thw, ... of the prompt.
    """
    features = [stream.push(frame) for frame in frames]
    return model.generate(spatial_features=features[-1:], **inputs)

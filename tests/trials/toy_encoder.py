"""An encoder that costs nothing, whose features depend on every pixel and on the order of the frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from store_kit import make_spec
from vggt_cache.frames import decode_frame
from vggt_cache.identity import EncoderSpec, Preprocessing
from vggt_cache.precompute import encode, run

PATCH = 14
_WEIGHTS = torch.arange(PATCH * PATCH, dtype=torch.float32).remainder(101) + 1


class ToyCheckpoint:
    """Stands in for `Checkpoint` and for the `Encoder` that it loads. Sums of small whole numbers: exact."""

    device = torch.device("cpu")
    layers = (0,)

    def __init__(self, *, pause_s: float = 0.0) -> None:
        """`pause_s`: how long a frame takes."""
        self._pause_s = pause_s

    def open(self, location: str, *, layer: Sequence[int]) -> ToyCheckpoint:
        return self

    def spec(self, compute_dtype: str) -> EncoderSpec:
        return make_spec(embed_dim=2).encoder

    def load(self, *, device: str, compute_dtype: str, tokens: str, pool: None) -> ToyCheckpoint:
        return self

    def frame_features(self, pixels: Tensor) -> Tensor:
        """uint8 [b, H, W, 3] to float32 [b, h, w, 4]: three means, and a sum in which no two places are alike."""
        time.sleep(self._pause_s * len(pixels))
        b, height, width, _ = pixels.shape
        patches = pixels.float().view(b, height // PATCH, PATCH, width // PATCH, PATCH, 3)
        patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(4)
        means, weighed = patches.mean(-1), (patches.sum(3) * _WEIGHTS).sum(-1)
        return torch.cat([means, weighed.unsqueeze(-1)], dim=-1)

    def list_feature(self, frames: Sequence[Tensor]) -> Tensor:
        """[h, w, 4] of frames uint8 [H, W, 3] in order."""
        return sum(
            (place * self.frame_features(frame[None])[0] for place, frame in enumerate(frames, 1)),
            torch.zeros(()),
        )


def toy_lists(
    encoder: ToyCheckpoint,
    lists: Sequence[Sequence[Hashable]],
    pixels: Callable[[Hashable], Tensor],
    *,
    batch_size: int,
) -> Iterator[tuple[int, Tensor]]:
    """In the place of `encode_lists`."""
    for position, frames in enumerate(lists):
        yield position, encoder.list_feature([pixels(frame) for frame in frames])


@contextmanager
def toy_encoder(checkpoint: ToyCheckpoint) -> Iterator[None]:
    """`precompute` computes with it as long as this lasts."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(run, "Checkpoint", checkpoint))
        stack.enter_context(mock.patch.object(encode, "encode_lists", toy_lists))
        yield


def toy_feature(files: Sequence[bytes], context: str, preprocessing: Preprocessing) -> Tensor:
    """What `precompute` must store for image files with these bytes."""
    pixels = [torch.from_numpy(decode_frame(data, preprocessing)) for data in files]
    toy = ToyCheckpoint()
    return toy.frame_features(pixels[-1][None])[0] if context == "frame" else toy.list_feature(pixels)

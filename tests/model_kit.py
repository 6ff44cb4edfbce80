"""Small models, prompts and images for the tests of `janusvln.model`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from janusvln.demo.tiny_qwen import TOKEN_IDS
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from janusvln.model.streaming import StreamingFeatures

CHANNELS = 48
HIDDEN = 96
Grid = tuple[int, int]


def load(directory: Path, **fields: Any) -> Any:
    """Our model on a plain tiny Qwen2.5-VL, its merger large enough for its part to be seen."""
    torch.manual_seed(0)
    model = JanusVLN.from_pretrained(
        directory, **{"spatial_channels": CHANNELS, "spatial_hidden_size": HIDDEN, **fields}
    )
    with torch.no_grad():
        for name, weight in model.merger.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (0.5 if name.endswith("weight") else 0.1))
    return model


def tokens_of(grid: Grid) -> int:
    return grid[0] * grid[1] // 4


def prompt(*grids: Grid, text: Sequence[int] = (10, 20, 30)) -> list[int]:
    """Token ids: some text, then each image, then the text again."""
    ids = list(text)
    for grid in grids:
        pads = [TOKEN_IDS["<|image_pad|>"]] * tokens_of(grid)
        ids += [TOKEN_IDS["<|vision_start|>"], *pads, TOKEN_IDS["<|vision_end|>"], 40]
    return [*ids, *text]


def rows(*prompts: list[int]) -> dict[str, Tensor]:
    """input_ids and attention_mask, padded on the left."""
    longest = max(map(len, prompts))
    pad = TOKEN_IDS["<|endoftext|>"]
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]),
    }


def images(*grids: Grid, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    patches = sum(h * w for h, w in grids)
    return {
        "pixel_values": torch.randn(patches, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids]),
    }


def places_of(input_ids: Tensor) -> list[Tensor]:
    """`image_positions` of a batch whose rows are samples."""
    ids = enumerate(input_ids)
    length = input_ids.shape[1]
    found = [row * length + (own == TOKEN_IDS["<|image_pad|>"]).nonzero()[:, 0] for row, own in ids]
    return [place for place in found if len(place)]


def feature(grid: Grid, seed: int = 0) -> Tensor:
    return torch.randn(*grid, CHANNELS, generator=torch.Generator().manual_seed(100 + seed))


def generate_from_frames(
    model: Any, stream: StreamingFeatures, frames: Iterable[Tensor], **inputs: Any
) -> Any:
    """`model.generate(**inputs)` for one prompt, with the feature of the last of `frames`.

    frames: those that `stream` has not seen yet, oldest first, each uint8 [H, W, 3]: in an episode the current one,
    after `stream.reset()` a whole list. inputs: input_ids, pixel_values, image_grid_thw, ... of the prompt.
    """
    features = [stream.push(frame) for frame in frames]
    return model.generate(spatial_features=features[-1:], **inputs)

"""Samples side by side (padded), or end to end in one row (packed, `--data_flatten`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from janusvln.data.chat import NOT_LEARNED

Item = dict[str, Any]
Batch = dict[str, Any]

_PADDING_POSITION = 1


@dataclass(frozen=True)
class PaddedCollator:
    """One sample a row [B, L], padded on the right. The mask follows from lengths, so no id has a second meaning."""

    pad_token_id: int

    def __call__(self, items: Sequence[Item]) -> Batch:
        longest = max(len(item["input_ids"]) for item in items)
        batch: Batch = {
            "input_ids": _stacked(items, "input_ids", longest, self.pad_token_id),
            "labels": _stacked(items, "labels", longest, NOT_LEARNED),
            "attention_mask": _mask([len(item["input_ids"]) for item in items], longest),
            "position_ids": torch.stack(
                [_padded(item["position_ids"], longest, _PADDING_POSITION) for item in items], dim=1
            ),
        }
        if "loss_weights" in items[0]:
            batch["loss_weights"] = _stacked(items, "loss_weights", longest, 0.0)
        starts = [row * longest for row in range(len(items))]
        return batch | _images(items, starts) | _actions(items, starts)


@dataclass(frozen=True)
class PackedCollator:
    """All samples in one row [1, sum of L], without padding and without an attention mask.

    The first row of `position_ids` [4, 1, sum of L] counts each sample's tokens from 0: from that transformers sees
    where a sample begins, and no sample attends to another, with sdpa as with flash attention.
    """

    def __call__(self, items: Sequence[Item]) -> Batch:
        lengths = [len(item["input_ids"]) for item in items]
        positions = [
            torch.cat([torch.arange(length)[None], item["position_ids"]])
            for length, item in zip(lengths, items, strict=True)
        ]
        batch: Batch = {
            name: torch.cat([item[name] for item in items])[None]
            for name in ("input_ids", "labels", "loss_weights")
            if name in items[0]
        }
        batch["position_ids"] = torch.cat(positions, dim=1)[:, None]
        starts = list(accumulate(lengths, initial=0))[:-1]
        return batch | _images(items, starts) | _actions(items, starts)


def _padded(values: Tensor, length: int, filling: float) -> Tensor:
    return pad(values, (0, length - values.shape[-1]), value=filling)


def _stacked(items: Sequence[Item], name: str, length: int, filling: float) -> Tensor:
    return torch.stack([_padded(item[name], length, filling) for item in items])


def _mask(lengths: Sequence[int], longest: int) -> Tensor:
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()


def _images(items: Sequence[Item], starts: Sequence[int]) -> Batch:
    """What belongs to images, sample by sample; nothing where no sample has any. `starts`: as in `_actions`.

    The grids are numbers and no tensor: the model needs them on the host, where a tensor would not stay.
    """
    shown = [(start, item) for start, item in zip(starts, items, strict=True) if "feature_request" in item]
    if not shown:
        return {}
    return {
        "image_grid_thw": [grid for _, item in shown for grid in item["image_grid_thw"].tolist()],
        "image_positions": [start + item["image_positions"] for start, item in shown],
        "feature_requests": [item["feature_request"] for _, item in shown],
    }


def _actions(items: Sequence[Item], starts: Sequence[int]) -> Batch:
    """`action_positions` counts through all rows of the batch; `starts`: where each sample begins in that count."""
    if "action_label" not in items[0]:
        return {}
    positions = [start + item["action_position"] for start, item in zip(starts, items, strict=True)]
    return {
        "action_labels": torch.tensor([item["action_label"] for item in items]),
        "action_positions": torch.tensor(positions),
    }

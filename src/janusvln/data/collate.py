"""Samples side by side (padded), or end to end in one row (packed, `--data_flatten`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from janusvln.data.dataset import Item
from janusvln.data.tokens import NOT_LEARNED

Batch = dict[str, Any]

_PADDING_POSITION = 1


@dataclass(frozen=True)
class PaddedCollator:
    """One sample a row [B, L], padded on the right. The mask follows from lengths, so no id has a second meaning."""

    pad_token_id: int

    def __call__(self, items: Sequence[Item]) -> Batch:
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        longest = int(lengths.max())
        fillings = {"input_ids": self.pad_token_id, "labels": NOT_LEARNED, "loss_weights": 0.0}
        batch: Batch = {
            name: pad_sequence([item[name] for item in items], batch_first=True, padding_value=filling)
            for name, filling in fillings.items()
            if name in items[0]
        }
        positions = [item["position_ids"].T for item in items]  # [L, 3]
        batch["position_ids"] = pad_sequence(positions, padding_value=_PADDING_POSITION).permute(2, 1, 0)
        batch["attention_mask"] = (torch.arange(longest)[None] < lengths[:, None]).long()
        return batch | _placed(items, [row * longest for row in range(len(items))])


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
        return batch | _placed(items, list(accumulate(lengths, initial=0))[:-1])


def _placed(items: Sequence[Item], starts: Sequence[int]) -> Batch:
    """What belongs to images and actions, where any sample has them; places count through all rows of the batch.

    `starts`: where each sample begins in that count. The grids are numbers and no tensor: the model needs them on the
    host, where a tensor would not stay.
    """
    batch: Batch = {}
    placed = list(zip(starts, items, strict=True))
    shown = [(start, item) for start, item in placed if "feature_request" in item]
    if shown:
        batch["image_grid_thw"] = [grid for _, item in shown for grid in item["image_grid_thw"].tolist()]
        batch["image_positions"] = [start + item["image_positions"] for start, item in shown]
        batch["feature_requests"] = [item["feature_request"] for _, item in shown]
    if "action_label" in items[0]:
        batch["action_labels"] = torch.tensor([item["action_label"] for item in items])
        batch["action_positions"] = torch.tensor([start + item["action_position"] for start, item in placed])
    return batch

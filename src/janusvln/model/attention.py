"""Which attention the model runs with, and how its vision tower attends without a loop over windows.

Qwen2.5-VL's vision tower attends inside windows of 8 x 8 patches in most layers, and inside whole images in the
others. Under sdpa transformers calls the kernel once for each window, 7,596 times for nine frames of 46 x 34 patches,
each too small to fill a GPU. But windows have few different lengths: whole ones, and those that the right and the
lower border cut. So the tower's tokens are put in the order of their windows' lengths, and windows of one length are
one batch: one call for each length, at most four where images have one size. The numbers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

BY_LENGTH = "sdpa_by_length"
"""The vision tower's attention in transformers' register, in the place of `sdpa`."""
LAYOUTS_KEPT = 64

Grids = tuple[tuple[int, int, int], ...]
"""Per image (t, h, w) in patches."""


def attention_implementation() -> str:
    """`flash_attention_2` where the package flash_attn is installed and there is a GPU for it, else `sdpa`."""
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which tokens attend to each other: those of one segment. Segments of one length stand together."""

    runs: tuple[tuple[int, int], ...]
    """(segments, tokens of each), one run after the other"""
    order: Tensor | None = None
    """int64 [tokens]: the tower's tokens in this order; None: as they are"""
    back: Tensor | None = None
    """int64 [tokens]: the inverse of `order`"""


@dataclass(frozen=True, kw_only=True)
class TowerLayout:
    """The tower's tokens for images of given grids, their windows sorted by length. Tensors are on its device."""

    window_index: Tensor
    """int64 [groups of 2 x 2 patches]: the order in which the tower has its tokens"""
    position_ids: Tensor
    """int64 [patches, 2]: row and column of each patch, in the order of the images"""
    windows: Segments
    images: Segments


def attend_by_length(tower: Any) -> None:
    """Let a Qwen2.5-VL vision tower that would run with sdpa attend by `BY_LENGTH`."""
    if tower.config._attn_implementation == "sdpa":
        tower.config._attn_implementation = BY_LENGTH
    for number, block in enumerate(tower.blocks):
        block.attn.sees_windows = number not in tower.fullatt_block_indexes


def tower_inputs(tower: Any, grids: Grids, device: torch.device) -> dict[str, Any]:
    """What the tower's forward takes beside pixels, so that nothing in it waits for the device.

    To transformers all tokens are then one segment, which it hands over whole; `layout` says which ones they are.
    """
    if tower.config._attn_implementation != BY_LENGTH:
        return {"grid_thw": torch.tensor(grids, device=device)}
    layout = tower_layout(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size, device)
    whole = torch.tensor([0, len(layout.position_ids)], dtype=torch.int32)
    return {
        "grid_thw": torch.tensor(grids),
        "position_ids": layout.position_ids,
        "window_index": layout.window_index,
        "cu_seqlens": whole,
        "cu_window_seqlens": whole,
        "layout": layout,
    }


@lru_cache(maxsize=LAYOUTS_KEPT)
def tower_layout(
    grids: Grids, merge_size: int, window_size: int, patch_size: int, device: torch.device
) -> TowerLayout:
    """The layout for images of these grids, remembered: a data set has few combinations of them."""
    with torch.inference_mode(False):  # what is remembered may be used in training later
        thw, group = torch.tensor(grids), merge_size**2
        index, ends = get_vision_window_index(thw, merge_size, window_size, patch_size)
        lengths = ends.long().diff()
        window_index = index[_segment_of(lengths, group).argsort(stable=True)]
        sizes = (thw[:, 1] * thw[:, 2]).repeat_interleave(thw[:, 0])
        order = _segment_of(sizes, group)[window_index].argsort(stable=True)
        order = (order[:, None] * group + torch.arange(group)).flatten()
        return TowerLayout(
            window_index=window_index.to(device),
            position_ids=get_vision_position_ids(thw, merge_size).to(device),
            windows=Segments(runs=_runs(lengths)),
            images=Segments(runs=_runs(sizes), order=order.to(device), back=order.argsort().to(device)),
        )


def _segment_of(lengths: Tensor, group: int) -> Tensor:
    """The number of each group's segment, where the longest come first, and those of one length as they are."""
    number = lengths.argsort(stable=True, descending=True).argsort()
    return number.repeat_interleave(lengths // group)


def _runs(lengths: Tensor) -> tuple[tuple[int, int], ...]:
    found = groupby(sorted(lengths.tolist(), reverse=True))
    return tuple((len(list(same)), length) for length, same in found)


def attention_by_length(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    layout: TowerLayout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, called once for each length of segment. q, k, v: [1, heads, tokens, channels of a head].

    Without a layout, as in a call of the tower by other code, they are one segment.
    """
    if layout is None:
        found: Any = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return found[0], None
    segments = layout.windows if module.sees_windows else layout.images
    tokens = [part[0].transpose(0, 1) for part in (query, key, value)]  # [tokens, heads, channels]
    if segments.order is not None:
        tokens = [part.index_select(0, segments.order) for part in tokens]
    sizes = [count * length for count, length in segments.runs]
    attended = []
    for run, *parts in zip(segments.runs, *(torch.split(part, sizes) for part in tokens), strict=True):
        q, k, v = (part.unflatten(0, run).transpose(1, 2) for part in parts)
        attended.append(sdpa_attention_forward(module, q, k, v, None, **settings)[0].flatten(0, 1))
    joined = torch.cat(attended)
    return (joined if segments.back is None else joined.index_select(0, segments.back))[None], None


AttentionInterface.register(BY_LENGTH, attention_by_length)

"""Spatial tokens: VGGT's patch features brought to the language model's width, and which of them belong to which image.

The merger computes what JanusVLN's computes (arXiv:2509.22548): each patch is normed by its root mean square, four
neighbouring patches become one token, and two linear layers with a GELU bring it to the language model's width.

A sample's feature is that of its current frame; it is added to every image of the sample, position by position. With
one sample in a batch this equals the reference, which repeats the batch's features in a row until they fill the images
(and so, with several samples, adds features of other samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm

from janusvln.model.attention import Grids
from vggt_cache.errors import VggtCacheError

MERGE_SIZE = 2
NORM_EPS = 1e-6


class SpatialFeatureError(VggtCacheError):
    """Images and features of a batch do not belong together."""

    exit_code = 2


class SpatialMerger(nn.Module):
    """Parameters `ln_q.weight` [C], `mlp.0` (4C to hidden) and `mlp.2` (hidden to out), as JanusVLN names them."""

    def __init__(self, channels: int, hidden_size: int, out_size: int) -> None:
        super().__init__()
        self.ln_q = Qwen2_5_VLRMSNorm(channels, eps=NORM_EPS)
        self.mlp = nn.Sequential(
            nn.Linear(channels * MERGE_SIZE**2, hidden_size), nn.GELU(), nn.Linear(hidden_size, out_size)
        )

    def forward(self, groups: Tensor) -> Tensor:
        """groups: [tokens, 4, C] in any float dtype, see `group_patches`. Returns [tokens, out] in the weights' dtype.

        The cast to the weights' dtype comes before the norm, as in the reference.
        """
        x = self.ln_q(groups.to(self.ln_q.weight.dtype))
        tokens: Tensor = self.mlp(x.flatten(1))
        return tokens


def even_grid(feature: Tensor) -> tuple[int, int]:
    """(h, w) of a feature [h, w, C] without the last row and column that have no partner."""
    h, w = feature.shape[:2]
    return h - h % MERGE_SIZE, w - w % MERGE_SIZE


def group_patches(feature: Tensor) -> Tensor:
    """[h, w, C] to [h//2 * w//2, 4, C]: 2x2 neighbours row-major, inside a group (0,0), (0,1), (1,0), (1,1)."""
    h, w = even_grid(feature)
    even = feature[:h, :w].reshape(h // MERGE_SIZE, MERGE_SIZE, w // MERGE_SIZE, MERGE_SIZE, -1)
    return even.permute(0, 2, 1, 3, 4).flatten(0, 1).flatten(1, 2)


def merge(merger: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """Spatial tokens of each feature [h, w, C], as [h//2 * w//2, out].

    One call of the module whatever the number of features: where its weights are spread over processes (ZeRO-3),
    all of them have to make the same calls.
    """
    groups = [group_patches(feature) for feature in features]
    tokens: Tensor = merger(torch.cat(groups))
    return list(torch.split(tokens, [len(group) for group in groups]))


class Views(NamedTuple):
    """What the samples of a batch see."""

    pixel_values: Tensor | None = None
    """[patches of all images, values]"""
    grids: Grids | None = None
    """`image_grid_thw` as numbers"""
    features: list[Tensor] | None = None
    """`spatial_features`: per sample that has images [h, w, C]"""
    positions: Sequence[Tensor] | None = None
    """`image_positions`: of the same samples int64 [image tokens], the tokens' places as indices into [B * L]; None:
    each row of `input_ids` is a sample, and they are read from it, for which the host waits for the device."""

    @classmethod
    def of(
        cls,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | Sequence[Sequence[int]] | None = None,
        spatial_features: list[Tensor] | None = None,
        image_positions: Sequence[Tensor] | None = None,
    ) -> Views:
        """From the fields of a batch. The host waits for the device where `image_grid_thw` is a tensor there."""
        if isinstance(image_grid_thw, Tensor):
            image_grid_thw = image_grid_thw.tolist()
        grids = None if image_grid_thw is None else tuple((t, h, w) for t, h, w in image_grid_thw)
        return cls(pixel_values, grids, spatial_features, image_positions)

    def places(self, is_image: Tensor) -> Sequence[Tensor]:
        """`positions`, or those of each row of a batch, from where its image tokens are [B, L]."""
        if self.positions is not None:
            return self.positions
        return torch.split(is_image.flatten().nonzero()[:, 0], is_image.sum(1).tolist())


VIEW_FIELDS = ("pixel_values", "image_grid_thw", "spatial_features", "image_positions")
"""The same under their names in a batch."""


def image_tokens(grid: Sequence[int]) -> int:
    """Tokens that an image of (t, h, w) patches takes in the prompt."""
    return grid[0] * grid[1] * grid[2] // MERGE_SIZE**2


def checked_counts(views: Views, tokens_per_sample: Sequence[int]) -> Sequence[int]:
    """Images of each sample that has any. Raises SpatialFeatureError unless everything in `views` fits together."""
    if views.pixel_values is None or views.grids is None or not views.features:
        given, lacks = ("features", "images") if views.features else ("images", "spatial_features")
        raise SpatialFeatureError(
            f"the batch has {given} without {lacks}: this model was made to see both, and would answer from half of "
            "its input; give pixel_values, image_grid_thw and one feature for each sample that has images"
        )
    counts = count_images(tokens_per_sample, views.grids)
    if len(views.features) != len(counts):
        raise SpatialFeatureError(
            f"{len(views.features)} features are given for {len(counts)} samples with {sum(counts)} "
            f"images, and {len(views.grids)} images: a feature would be added to another sample's image; give one "
            "feature for each sample that has images, in order (and image_positions, where several samples share a row)"
        )
    grids = iter(views.grids)
    for sample, (feature, count) in enumerate(zip(views.features, counts, strict=True)):
        for _ in range(count):
            _check_grid(sample, feature, next(grids))
    return counts


def count_images(tokens_per_sample: Sequence[int], grids: Grids) -> list[int]:
    """Images of each sample that has any, from how many image tokens each sample has.

    Raises SpatialFeatureError when the images do not fill the samples.
    """
    sizes = [image_tokens(grid) for grid in grids]
    counts, first = [], 0
    for sample, tokens in enumerate(tokens_per_sample):
        last, left = first, tokens
        while left > 0 and last < len(sizes):
            left -= sizes[last]
            last += 1
        if left:
            raise SpatialFeatureError(
                f"sample {sample} of the batch has {tokens} image tokens, which its images of {sizes[first:last]} "
                "tokens do not fill: the prompt was cut inside an image, or belongs to other images; raise "
                "--model_max_length or lower --max_history_images"
            )
        if last > first:
            counts.append(last - first)
        first = last
    if first < len(sizes):
        raise SpatialFeatureError(
            f"the prompts have places for {first} images, but {len(sizes)} are given: some image would go into another "
            "sample's prompt; give each image one place, in order"
        )
    return counts


def _check_grid(sample: int, feature: Tensor, grid: Sequence[int]) -> None:
    even_h, even_w = even_grid(feature)
    if (1, even_h, even_w) == tuple(grid):
        return
    h, w = feature.shape[:2]
    used = f", of which {even_h} x {even_w} are used" if (h, w) != (even_h, even_w) else ""
    raise SpatialFeatureError(
        f"sample {sample} of the batch has a feature of {h} x {w} patches (rows x columns){used}, but an image of "
        f"{grid[1]} x {grid[2]} patches: they cannot be added position by position; make image and feature from the "
        "same resized frame (same --image_size and --resize_mode, and pixel limits that resize nothing)"
    )

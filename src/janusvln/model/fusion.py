"""Which spatial tokens belong to which image, and their sum.

A sample's feature is that of its current frame; it is added to every image of the sample, position by position. With
one sample in a batch this equals the reference, which repeats the batch's features in a row until they fill the images
(and so, with several samples, adds features of other samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from janusvln.model.attention import Grids
from janusvln.model.merger import MERGE_SIZE, even_grid
from vggt_cache.errors import VggtCacheError


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


class SpatialFeatureError(VggtCacheError):
    """Images and features of a batch do not belong together."""

    exit_code = 2


def unseen_images(tokens: int) -> SpatialFeatureError:
    return SpatialFeatureError(
        f"the prompts have {tokens} image tokens, but no image is given: the model would answer without seeing; give "
        "pixel_values, image_grid_thw and spatial_features"
    )


def checked_counts(views: Views, tokens_per_sample: Sequence[int]) -> Sequence[int]:
    """Images of each sample that has any. Raises SpatialFeatureError unless everything in `views` fits together."""
    if views.pixel_values is None or views.grids is None or not views.features:
        given, lacks = ("features", "images") if views.features else ("images", "spatial_features")
        raise SpatialFeatureError(
            f"the batch has {given} without {lacks}: this model was made to see both, and would answer from half of "
            "its input; give pixel_values, image_grid_thw and one feature for each sample that has images"
        )
    counts = count_images(tokens_per_sample, views.grids)
    check_fits(views.features, counts, views.grids)
    return counts


def image_tokens(grid: Sequence[int]) -> int:
    """Tokens that an image of (t, h, w) patches takes in the prompt."""
    return grid[0] * grid[1] * grid[2] // MERGE_SIZE**2


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


def check_fits(features: Sequence[Tensor], images_per_sample: Sequence[int], grids: Grids) -> None:
    """Raises SpatialFeatureError unless each sample has one feature, with the grid of each of its images."""
    if len(features) != len(images_per_sample) or sum(images_per_sample) != len(grids):
        raise SpatialFeatureError(
            f"{len(features)} features are given for {len(images_per_sample)} samples with {sum(images_per_sample)} "
            f"images, and {len(grids)} images: a feature would be added to another sample's image; give one feature "
            "for each sample that has images, in order (and image_positions, where several samples share a row)"
        )
    image = 0
    for sample, (feature, count) in enumerate(zip(features, images_per_sample, strict=True)):
        for grid in grids[image : image + count]:
            if (1, *even_grid(feature)) != tuple(grid):
                raise _other_grid(sample, feature, grid)
        image += count


def _other_grid(sample: int, feature: Tensor, grid: Sequence[int]) -> SpatialFeatureError:
    h, w = feature.shape[:2]
    even_h, even_w = even_grid(feature)
    used = f", of which {even_h} x {even_w} are used" if (h, w) != (even_h, even_w) else ""
    return SpatialFeatureError(
        f"sample {sample} of the batch has a feature of {h} x {w} patches (rows x columns){used}, but an image of "
        f"{grid[1]} x {grid[2]} patches: they cannot be added position by position; make image and feature from the "
        "same resized frame (same --image_size and --resize_mode, and pixel limits that resize nothing)"
    )


def add_spatial(
    images: Sequence[Tensor], spatial: Sequence[Tensor], images_per_sample: Sequence[int], lam: float
) -> list[Tensor]:
    """Image tokens [tokens, D] of each image, plus `lam` times the spatial tokens of the image's sample.

    images: per image; spatial: per sample; both in the order of the batch, checked by `check_fits`.
    """
    owners = [tokens for tokens, count in zip(spatial, images_per_sample, strict=True) for _ in range(count)]
    return [image + lam * own.to(image) for image, own in zip(images, owners, strict=True)]

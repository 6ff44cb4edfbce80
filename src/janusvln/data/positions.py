"""Position ids of a sample, by transformers' own rule and without a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel


class RopePositions:
    """Borrows the rule of Qwen2_5_VLModel, which reads nothing of the model but its config."""

    get_rope_index: Any = Qwen2_5_VLModel.get_rope_index
    get_vision_position_ids: Any = Qwen2_5_VLModel.get_vision_position_ids

    def __init__(self, config: Any) -> None:
        self.config = config

    def __call__(self, input_ids: Tensor, image_grid_thw: Tensor | None) -> Tensor:
        """Temporal, height and width positions int64 [3, L] of one sample's `input_ids` [L].

        `image_grid_thw`: int64 [images, 3] in patches, or None for text alone.
        """
        is_image = (input_ids == self.config.image_token_id).int()
        positions, _ = self.get_rope_index(input_ids[None], is_image[None], image_grid_thw=image_grid_thw)
        result: Tensor = positions[:, 0]
        return result

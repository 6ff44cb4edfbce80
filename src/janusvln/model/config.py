"""The configuration: Qwen2.5-VL's, and what the spatial merger adds to it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, Qwen2_5_VLConfig


@strict
class JanusVLNConfig(Qwen2_5_VLConfig):  # type: ignore[misc, no-untyped-call]
    """Written to config.json beside Qwen2.5-VL's own fields; `model_type` stays `qwen2_5_vl`."""

    lam: float | int = 0.2
    """Factor of the spatial tokens where they are added to the image tokens."""
    spatial_channels: int = 2048
    """Channels of a feature: twice VGGT's embedding dimension."""
    spatial_hidden_size: int = 4096
    """Between the two linear layers of the merger."""
    action_head: bool = False
    """Whether the model has a linear head for the four actions."""
    distill_loss_weight: float | int = 1.0
    """Factor of the action head's loss where it is added to the language loss."""
    feature_spec: dict[str, Any] | None = None
    """Which features the weights were trained with (context, image_size, layer, ...); None where nobody said."""


OWN_FIELDS = tuple(JanusVLNConfig.__annotations__)


def as_janusvln_config(config: PreTrainedConfig) -> JanusVLNConfig:
    """A JanusVLNConfig with the values of `config`, which may be the Qwen2_5_VLConfig that AutoConfig returns."""
    if isinstance(config, JanusVLNConfig):
        return config
    own = JanusVLNConfig.from_dict(config.to_dict())
    own._attn_implementation = config._attn_implementation
    return own

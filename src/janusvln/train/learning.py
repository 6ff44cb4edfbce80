"""Which parts of the model learn, and how fast."""

from __future__ import annotations

from typing import Any

from torch import nn

from janusvln.model import lora
from janusvln.train.arguments import ModelArguments, TrainingArguments


def freeze(model: nn.Module, arguments: ModelArguments) -> None:
    """Set `requires_grad` of every parameter as the flags say. What JanusVLN adds is always trained."""
    trained = {
        "added": True,
        "projector": arguments.tune_mm_mlp,
        "vision": arguments.tune_mm_vision,
        "language": arguments.tune_mm_llm and not arguments.lora_enable,
        "adapter": True,
    }
    for name, parameter in model.named_parameters():
        parameter.requires_grad = trained[part_of(name)]


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    if lora.MARK in name:
        return "adapter"
    steps = name.split(".")
    if "visual" in steps:
        return "projector" if "merger" in steps else "vision"
    return "added" if steps[0] in ("merger", "action_head") else "language"


def parameter_groups(
    model: nn.Module, arguments: TrainingArguments, decaying: set[str]
) -> list[dict[str, Any]]:
    """Groups for the optimizer. Both mergers learn with `mm_projector_lr`, the vision tower with `vision_tower_lr`.

    `decaying`: names of the parameters that weight decay applies to. Empty groups are left out.
    """
    mergers, vision = arguments.mm_projector_lr, arguments.vision_tower_lr
    rates = {"added": mergers, "projector": mergers, "vision": vision, "language": None, "adapter": None}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates[part_of(name)]
            decay = arguments.weight_decay if name in decaying else 0.0
            groups.setdefault((arguments.learning_rate if rate is None else rate, decay), []).append(
                parameter
            )
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]

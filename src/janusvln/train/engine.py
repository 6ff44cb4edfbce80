"""DeepSpeed's configuration, held against the flags before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

from vggt_cache.errors import SettingsError


def check_file(given: Any) -> None:
    """Raises SettingsError for sections that would replace what the flags describe, before DeepSpeed acts on them."""
    config = given
    if isinstance(given, str):
        try:
            config = json.loads(Path(given).read_text())
        except (OSError, ValueError):
            return  # transformers says what is wrong with it
    for section in ("optimizer", "scheduler"):
        if isinstance(config, dict) and section in config:
            raise SettingsError(
                f"--deepspeed {given} has the section {section}, which would take the place of the flags' and drop the "
                "learning rates of mergers and vision tower: remove it there, and use --optim, --learning_rate and "
                "--lr_scheduler_type"
            )


def check_values(arguments: transformers.TrainingArguments) -> None:
    """Raises SettingsError where the file contradicts the flags; transformers would say so when the model is loaded.

    And where no checkpoint could be written of what it divides among ranks.
    """
    config = arguments.hf_deepspeed_config if arguments.deepspeed else None
    if differing := getattr(config, "mismatches", None):
        values = "; ".join(
            text.removeprefix("- ds ").replace(" vs hf ", ", and the flags say ") for text in differing
        )
        raise SettingsError(
            f'--deepspeed {arguments.deepspeed} contradicts the flags ({values}): write "auto" there, as in '
            "scripts/zero3.json, or give the same value"
        )
    zero = zero_settings(arguments) or {}
    gathers = "stage3_gather_16bit_weights_on_model_save"
    if zero.get("stage") == 3 and not zero.get(gathers):
        raise SettingsError(
            f"--deepspeed {arguments.deepspeed} is ZeRO-3 without {gathers}, so no checkpoint and no result would hold "
            "the model's weights: set it to true there, as scripts/zero3.json does"
        )


def zero_settings(arguments: transformers.TrainingArguments) -> dict[str, Any] | None:
    """`zero_optimization` of the DeepSpeed configuration; None without DeepSpeed."""
    if not arguments.deepspeed:
        return None
    config = getattr(arguments.hf_deepspeed_config, "config", {})
    found: dict[str, Any] = config.get("zero_optimization", {})
    return found

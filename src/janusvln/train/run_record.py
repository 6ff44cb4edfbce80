"""Which run a checkpoint belongs to: a run that goes on from it must be the one that wrote it, or is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from janusvln.train.arguments import Arguments
from janusvln.train.engine import zero_settings
from vggt_cache.errors import SettingsError

RECORD_FILE = "run_record.json"
"""Beside every saved model."""
LEARNING = (
    *("tune_mm_llm", "tune_mm_vision", "tune_mm_mlp", "lam", "action_head", "distill_loss_weight"),
    *("model_max_length", "max_history_images", "min_pixels", "max_pixels", "data_flatten"),
    *("subinstruction_weight", "desc2d_weight", "desc3d_weight", "action_weight"),
    *("learning_rate", "mm_projector_lr", "vision_tower_lr", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("loss_mean_over", "bf16", "fp16"),
)
"""Flags that say what is learned of each sample, and how. Of some a resumed run would take the checkpoint's values
without a word, such as learning rates, and of others the new ones. How long a run is may change. LoRA's flags are
compared where its checkpoints are read."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What decides which samples each step of a run sees, what is learned of them, and for which processes its
    optimizer's state is cut up."""

    world_size: int
    zero_stage: int | None
    """None: without DeepSpeed."""
    batch_size: int
    accumulation: int
    seed: int
    by_length: bool
    drop_last: bool
    samples: int
    """Those that are left out count too."""
    samples_digest: str
    """Of the annotations, in their order; see `SampleIndex.digest`."""
    skipped: str
    """Which samples are left out; see `skipped_text`."""
    learning: dict[str, Any]
    """The values of the flags in LEARNING."""

    @classmethod
    def of(cls, groups: Arguments, *, samples: int, samples_digest: str, skipped: str) -> RunRecord:
        arguments = groups[-1]
        zero = zero_settings(arguments)
        return cls(
            world_size=arguments.world_size,
            zero_stage=None if zero is None else zero.get("stage", 0),
            batch_size=arguments.per_device_train_batch_size,
            accumulation=arguments.gradient_accumulation_steps,
            seed=arguments.seed if arguments.data_seed is None else arguments.data_seed,
            by_length=arguments.group_by_modality_length,
            drop_last=arguments.dataloader_drop_last,
            samples=samples,
            samples_digest=samples_digest,
            skipped=skipped,
            learning={name: _value(groups, name) for name in LEARNING},
        )

    def write(self, directory: str) -> None:
        (Path(directory) / RECORD_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def check(self, checkpoint: Path) -> None:
        """Raises SettingsError where a run that goes on from the checkpoint would not be the one that wrote it."""
        instead = (
            "start as it was started, or give another --output_dir (OUTPUT_DIR) and --model_name_or_path (MODEL_PATH) "
            f"{checkpoint} to go on from its weights alone"
        )
        try:
            found = RunRecord(**read_json(checkpoint / RECORD_FILE))
        except TypeError:  # absent, torn, or another's
            raise SettingsError(
                f"{checkpoint} has no {RECORD_FILE} that says which run wrote it, so samples may come twice or never "
                f"in a run that goes on from it: {instead}"
            ) from None
        was, now = found._flat(), self._flat()
        if differ := [name for name in now if was.get(name) != now[name]]:
            lost = "some samples of this epoch would come twice and others never"
            if set(differ) <= set(LEARNING):
                lost = "it would be another training from here on"
            if {"world_size", "zero_stage"} & set(differ):
                lost = "the optimizer's state cannot be carried over"
            raise SettingsError(
                f"{checkpoint} was written by {found._words(differ)}, and this run has {self._words(differ)}: "
                f"{lost}; {instead}"
            )

    def _flat(self) -> dict[str, Any]:
        own = asdict(self)
        learning: dict[str, Any] = own.pop("learning")
        return own | learning

    def _words(self, fields: Sequence[str]) -> str:
        engine = "no DeepSpeed" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        words = []
        if {"world_size", "zero_stage"} & set(fields):
            words.append(f"{self.world_size} process{'es' if self.world_size > 1 else ''} with {engine}")
            fields = [name for name in fields if name not in ("world_size", "zero_stage")]
        own = self._flat()
        return ", ".join(words + [f"{_FLAGS.get(name, f'--{name}')} {own.get(name)}" for name in fields])


_FLAGS = {
    "batch_size": "--per_device_train_batch_size",
    "accumulation": "--gradient_accumulation_steps",
    "seed": "--seed (or --data_seed)",
    "by_length": "--group_by_modality_length",
    "drop_last": "--dataloader_drop_last",
    "samples": "a number of samples of",
    "samples_digest": "annotations of digest",
    "skipped": "a skipped_samples.jsonl of",
}


def _value(groups: Arguments, name: str) -> Any:
    value = next(getattr(group, name) for group in groups if hasattr(group, name))
    return getattr(value, "value", value)  # of transformers' enums


def read_json(path: Path) -> Any:
    """What a file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

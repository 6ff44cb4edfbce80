"""Which checkpoint a run goes on from (the latest that every rank finds complete), and its weights."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from janusvln.model import lora
from janusvln.model.checkpoints import name_in_model
from janusvln.train.arguments import TrainingArguments, zero_settings
from janusvln.train.ranks import Ranks
from vggt_cache.encoder.files import find_files
from vggt_cache.errors import CheckpointError, DataError, SettingsError

_NAME = re.compile(r"checkpoint-([0-9]+)")
TRAINER_STATE = "trainer_state.json"
"""Written last, when all ranks have written their parts: a checkpoint that has it is whole."""
RECORD_FILE = "run_record.json"
"""Beside every saved model."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What decides which samples each step of a run sees, and for which processes its optimizer's state is cut up."""

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

    @classmethod
    def of(
        cls, arguments: TrainingArguments, *, samples: int, samples_digest: str, skipped: str
    ) -> RunRecord:
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
        )

    def write(self, directory: str) -> None:
        (Path(directory) / RECORD_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def check(self, checkpoint: Path) -> None:
        """Raises SettingsError where a run that goes on from the checkpoint would not be the one that wrote it."""
        instead = (
            "start as it was started, or give another --output_dir and --model_name_or_path "
            f"{checkpoint} to go on from its weights alone"
        )
        try:
            found = RunRecord(**_json(checkpoint / RECORD_FILE))
        except TypeError:  # absent, torn, or another's
            raise SettingsError(
                f"{checkpoint} has no {RECORD_FILE} that says which run wrote it, so samples may come twice or never "
                f"in a run that goes on from it: {instead}"
            ) from None
        if found != self:
            differ = [field for field, value in asdict(self).items() if getattr(found, field) != value]
            lost = "the optimizer's state cannot be carried over"
            if not {"world_size", "zero_stage"} & set(differ):
                lost = "some samples of this epoch would come twice and others never"
            raise SettingsError(
                f"{checkpoint} was written by {found._words(differ)}, and this run has {self._words(differ)}: "
                f"{lost}; {instead}"
            )

    def _words(self, fields: Sequence[str]) -> str:
        engine = "no DeepSpeed" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        words = []
        if {"world_size", "zero_stage"} & set(fields):
            words.append(f"{self.world_size} process{'es' if self.world_size > 1 else ''} with {engine}")
        return ", ".join(
            words + [f"{_FLAGS[name]} {getattr(self, name)}" for name in fields if name in _FLAGS]
        )


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


def checkpoint_to_resume(output_dir: str, record: RunRecord, ranks: Ranks) -> str | None:
    """The checkpoint's directory, the same on every rank; None where there is none.

    transformers writes a checkpoint in place, so a process that was killed meanwhile leaves one that nothing can
    be resumed from; it is passed over. Raises SettingsError where the last one was written by another run, or where
    all hold the model alone, and DataError where a rank does not see what rank 0 sees.
    """
    named = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    written = {int(name[1]): path for name, path in named if name and _json(path / TRAINER_STATE) is not None}
    if written:
        record.check(written[max(written)])
        if not any(_has_optimizer(path, record) for path in written.values()):
            raise SettingsError(_only_model(written[max(written)]))
    # What this rank writes of every checkpoint, beside its part of the optimizer's state.
    random_state = "rng_state.pth" if ranks.world_size == 1 else f"rng_state_{ranks.rank}.pth"
    whole = {step: path for step, path in written.items() if (path / random_state).is_file()}
    steps = sorted(step for step, path in whole.items() if _has_optimizer(path, record))
    own = json.dumps({"host": socket.gethostname(), "steps": steps})
    seen = [json.loads(text) for text in ranks.exchange("checkpoints", own)]
    common = set(seen[0]["steps"]).intersection(*(one["steps"] for one in seen))
    if seen[0]["steps"] and not common:
        blind = next(one for one in seen if not set(one["steps"]) & set(seen[0]["steps"]))
        raise DataError(
            f"{output_dir} holds checkpoint-{max(seen[0]['steps'])} on {seen[0]['host']}, and none that is complete on "
            f"{blind['host']}: to resume, all nodes must share --output_dir; to start anew, empty it"
        )
    return str(Path(output_dir) / f"checkpoint-{max(common)}") if common else None


def given_checkpoint(given: str, output_dir: str, record: RunRecord, ranks: Ranks) -> str | None:
    """The checkpoint that --resume_from_checkpoint names: a path, `True` for the last one, `False` for none.

    Raises SettingsError where nothing can be resumed from it.
    """
    if given in ("True", "true", "False", "false"):
        wanted, last = given[0] in "Tt", checkpoint_to_resume(output_dir, record, ranks)
        if wanted and last is None:
            raise SettingsError(
                f"--resume_from_checkpoint {given}: {output_dir} holds no complete checkpoint: leave the flag out, "
                "and training goes on from the last one where there is one, and else begins"
            )
        if last and not wanted:
            raise SettingsError(
                f"--resume_from_checkpoint {given}: {output_dir} holds {Path(last).name}, which would be written over: "
                "give another --output_dir to begin anew, or leave the flag out to go on"
            )
        return last
    if _json(Path(given) / TRAINER_STATE) is None:
        raise SettingsError(
            f"--resume_from_checkpoint {given} is no directory of a checkpoint (it has no trainer_state.json), so "
            "nothing can be resumed from it: give one, or leave the flag out to go on from the last in --output_dir"
        )
    record.check(Path(given))
    if not _has_optimizer(Path(given), record):
        raise SettingsError(_only_model(Path(given)))
    return given


def _has_optimizer(checkpoint: Path, record: RunRecord) -> bool:
    if record.zero_stage is None:
        return all((checkpoint / name).is_file() for name in ("optimizer.pt", "scheduler.pt"))
    kind = "optim" if record.zero_stage else "model"  # which without ZeRO holds the optimizer's too
    return any(checkpoint.glob(f"global_step*/*{kind}_states.pt"))


def _only_model(checkpoint: Path) -> str:
    return (
        f"{checkpoint} holds no optimizer's state (it may have been written with --save_only_model), so no run can go "
        f"on from it: give another --output_dir and --model_name_or_path {checkpoint} to go on from its weights alone"
    )


def trained_features(checkpoint: str) -> dict[str, Any] | None:
    """What a checkpoint says about the features it was trained with; None where it says nothing."""
    fields = _json(Path(checkpoint) / "config.json")
    trained = fields.get("feature_spec") if isinstance(fields, dict) else None
    return trained if isinstance(trained, dict) else None


def is_finished(checkpoint: str, arguments: TrainingArguments) -> bool:
    """Whether the run that the flags describe ends with this checkpoint: transformers would add a step to it."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE).read_text())
    if arguments.max_steps > 0:
        return bool(state["global_step"] >= arguments.max_steps)
    return bool((state.get("epoch") or 0) >= arguments.num_train_epochs)


def copy_model(checkpoint: str, output_dir: str) -> None:
    """Put a checkpoint's model where a run leaves its own, as far as it is not there."""
    for pattern in ("*.safetensors", "*.json", "*.jinja"):
        for path in Path(checkpoint).glob(pattern):
            if not (Path(output_dir) / path.name).exists():
                shutil.copy2(path, output_dir)


def load_weights(model: nn.Module, directory: str) -> None:
    """Put a checkpoint's weights into the model. Raises CheckpointError unless they are exactly the model's.

    transformers' Trainer takes the names in the files for the model's, which they are not (files keep Qwen2.5-VL's
    published names), and goes on from random weights with a warning.
    """
    if lora.is_adapted(model):
        lora.load(model, Path(directory))
        return
    weights: dict[str, torch.Tensor] = {}
    for path in find_files(Path(directory)):
        weights |= {name_in_model(name): weight for name, weight in load_file(path).items()}
    result = model.load_state_dict(weights, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = [name for name in result.missing_keys if name not in tied] + result.unexpected_keys
    if wrong:
        raise CheckpointError(
            f"{directory} does not hold this model's weights ({wrong[0]} and {len(wrong) - 1} more differ), so nothing "
            "can be resumed from it: use the flags it was trained with, or an empty --output_dir"
        )


def _json(path: Path) -> Any:
    """What a file holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None

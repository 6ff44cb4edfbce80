"""Checkpoints: which one a run goes on from (the latest that every rank finds complete), its weights, and the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from janusvln.model import lora
from janusvln.model.checkpoints import name_in_model
from janusvln.model.config import JanusVLNConfig
from janusvln.train.arguments import TrainingArguments
from janusvln.train.ranks import Ranks
from janusvln.train.run_record import RunRecord, read_json
from vggt_cache.encoder.files import find_files
from vggt_cache.errors import CheckpointError, DataError, FileAccessError, SettingsError
from vggt_cache.precompute.report import bytes_text

_NAME = re.compile(r"checkpoint-([0-9]+)")
TRAINER_STATE = "trainer_state.json"
"""Written last, when all ranks have written their parts: a checkpoint that has it is whole."""
_OF_WRITING = re.compile("PytorchStreamWriter|inline_container")
"""In what torch says where a file cannot be written."""


def checkpoint_to_resume(output_dir: str, record: RunRecord, ranks: Ranks) -> str | None:
    """The checkpoint's directory, the same on every rank; None where there is none.

    transformers writes a checkpoint in place, so a process that was killed meanwhile leaves one that nothing can
    be resumed from; it is passed over. Raises SettingsError where the last one was written by another run, or where
    all hold the model alone, and DataError where a rank does not see what rank 0 sees.
    """
    named = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    written = {
        int(name[1]): path for name, path in named if name and read_json(path / TRAINER_STATE) is not None
    }
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
    if read_json(Path(given) / TRAINER_STATE) is None:
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
    fields = read_json(Path(checkpoint) / "config.json")
    trained = fields.get("feature_spec") if isinstance(fields, dict) else None
    return trained if isinstance(trained, dict) else None


def check_model(checkpoint: str, config: JanusVLNConfig, model_path: str) -> None:
    """Raises SettingsError where the model that is named is built otherwise than the one to go on with."""
    was, now = _built(JanusVLNConfig.from_pretrained(checkpoint)), _built(config)
    if differ := [name for name, value in now.items() if was[name] != value]:
        before, here = (", ".join(f"{name} {one[name]}" for name in differ) for one in (was, now))
        raise SettingsError(
            f"{checkpoint} holds a model with {before}, and --model_name_or_path {model_path} has {here}: start as the "
            "run was started, or give another --output_dir"
        )


def _built(config: JanusVLNConfig) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    text = config.get_text_config()
    return {name: getattr(text, name) for name in names} | {
        name: getattr(config, name)
        for name in ("spatial_channels", "spatial_hidden_size", "lam", "action_head")
    }


def is_finished(checkpoint: str, arguments: TrainingArguments) -> bool:
    """Whether the run that the flags describe ends with this checkpoint: transformers would add a step to it."""
    state = json.loads((Path(checkpoint) / TRAINER_STATE).read_text())
    if arguments.max_steps > 0:
        return bool(state["global_step"] >= arguments.max_steps)
    return bool((state.get("epoch") or 0) >= arguments.num_train_epochs)


def copy_model(checkpoint: str, output_dir: str) -> None:
    """Put a checkpoint's model where a run leaves its own, as far as it is not there.

    What lies there may be of an earlier end of this run, or half written when it was killed: it is whole where the
    state beside it, which is written last, is of the same step.
    """
    source, target = Path(checkpoint), Path(output_dir)
    whole = _step(target / TRAINER_STATE) == _step(source / TRAINER_STATE)
    found = [path for pattern in ("*.safetensors", "*.json", "*.jinja") for path in source.glob(pattern)]
    for path in sorted(found, key=lambda one: one.name == TRAINER_STATE):
        if not whole or not (target / path.name).exists():
            shutil.copy2(path, target)


def _step(trainer_state: Path) -> Any:
    return (read_json(trainer_state) or {}).get("global_step")


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Raises FileAccessError in place of what torch and safetensors say where a model cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if isinstance(error, RuntimeError) and not _OF_WRITING.search(str(error)):
            raise
        raise FileAccessError(
            directory,
            f"cannot be written ({' '.join(str(error).split())[:150]}; {_free_text(directory)}), so training ends "
            "here, and the last checkpoint before it is kept: make room, and the same command goes on from there",
        ) from error


def sync_tree(directory: str | Path) -> None:
    """Have the disk hold all of a directory, so that a loss of power leaves it whole. Raises OSError."""
    for folder, _, names in os.walk(directory):
        for path in (*(os.path.join(folder, name) for name in names), folder):
            try:
                fd = os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # another rank's, which has its final name by now
                continue
            try:
                os.fsync(fd)
            except OSError as error:
                if error.errno != errno.EINVAL:  # a file system on which this needs none
                    raise
            finally:
                os.close(fd)


def _free_text(directory: Path) -> str:
    try:
        return f"{bytes_text(shutil.disk_usage(directory).free)} are free"
    except OSError:
        return "its disk does not answer"


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

"""Which checkpoint a run goes on from (the latest that every rank finds complete), and its weights."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments

from janusvln.model.checkpoints import name_in_model
from janusvln.train.ranks import Ranks
from vggt_cache.encoder.files import find_files
from vggt_cache.errors import CheckpointError, DataError, SettingsError

_NAME = re.compile(r"checkpoint-([0-9]+)")
TRAINER_STATE = "trainer_state.json"
MAKER_FILE = "maker.json"
"""Beside every saved model: which processes and which engine wrote its optimizer's state."""


@dataclass(frozen=True, kw_only=True)
class Maker:
    """What a checkpoint's optimizer state is cut up for."""

    world_size: int
    zero_stage: int | None
    """None: without DeepSpeed."""

    @classmethod
    def of(cls, arguments: TrainingArguments) -> Maker:
        config = getattr(arguments.hf_deepspeed_config, "config", None) if arguments.deepspeed else None
        stage = None if config is None else config.get("zero_optimization", {}).get("stage", 0)
        return cls(world_size=arguments.world_size, zero_stage=stage)

    def write(self, directory: str) -> None:
        (Path(directory) / MAKER_FILE).write_text(json.dumps(asdict(self)) + "\n")

    def check(self, checkpoint: Path) -> None:
        """Raises SettingsError where the checkpoint was written in another way than this run would read it."""
        try:
            found = Maker(**_json(checkpoint / MAKER_FILE))
        except TypeError:  # not written by us: transformers says what it cannot load
            return
        if found != self:
            raise SettingsError(
                f"{checkpoint} was written by {found}, and this run has {self}: the optimizer's state cannot be "
                "carried over; start as it was started, or give another --output_dir and --model_name_or_path "
                f"{checkpoint} to go on from its weights alone"
            )

    def __str__(self) -> str:
        engine = "no DeepSpeed" if self.zero_stage is None else f"ZeRO-{self.zero_stage}"
        return f"{self.world_size} process{'es' if self.world_size > 1 else ''} with {engine}"


def checkpoint_to_resume(output_dir: str, maker: Maker, ranks: Ranks) -> str | None:
    """The checkpoint's directory, the same on every rank; None where there is none.

    transformers writes a checkpoint in place, so a process that was killed meanwhile leaves one that nothing can
    be resumed from; it is passed over. Raises SettingsError where the last one was written in another way, and
    DataError where a rank does not see what rank 0 sees.
    """
    named = [(_NAME.fullmatch(path.name), path) for path in Path(output_dir).glob("checkpoint-*")]
    written = {int(name[1]): path for name, path in named if name and _json(path / TRAINER_STATE) is not None}
    if written:
        maker.check(written[max(written)])
    # What is written last: the trainer's state, and this rank's random state.
    random_state = "rng_state.pth" if ranks.world_size == 1 else f"rng_state_{ranks.rank}.pth"
    steps = [step for step in sorted(written) if (written[step] / random_state).is_file()]
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


def given_checkpoint(path: str, maker: Maker) -> str:
    """The checkpoint that --resume_from_checkpoint names. Raises SettingsError where nothing can be resumed from it."""
    if _json(Path(path) / TRAINER_STATE) is None:
        raise SettingsError(
            f"--resume_from_checkpoint {path} is no directory of a checkpoint (it has no trainer_state.json), so "
            "nothing can be resumed from it: give one, or leave the flag out to go on from the last in --output_dir"
        )
    maker.check(Path(path))
    return path


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

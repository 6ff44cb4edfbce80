"""Which checkpoint a run goes on from (the latest that every rank finds complete), and its weights."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from qwen_vl.model.checkpoints import name_in_model
from qwen_vl.train.ranks import Ranks
from vggt_cache.encoder.locate import find_files
from vggt_cache.errors import CheckpointError, DataError

_NAME = re.compile(r"checkpoint-([0-9]+)")


def checkpoint_to_resume(output_dir: str, ranks: Ranks) -> str | None:
    """The checkpoint's directory, the same on every rank; None where there is none.

    transformers writes a checkpoint in place, so a process that was killed meanwhile leaves one that nothing can
    be resumed from; it is passed over. Raises DataError where a rank does not see what rank 0 sees.
    """
    own = {"host": socket.gethostname(), "steps": complete_steps(output_dir, ranks.rank, ranks.world_size)}
    seen = [json.loads(text) for text in ranks.exchange("checkpoints", json.dumps(own))]
    common = set(seen[0]["steps"]).intersection(*(one["steps"] for one in seen))
    if seen[0]["steps"] and not common:
        blind = next(one for one in seen if not set(one["steps"]) & set(seen[0]["steps"]))
        raise DataError(
            f"{output_dir} holds checkpoint-{max(seen[0]['steps'])} on {seen[0]['host']}, and none that is complete on "
            f"{blind['host']}: to resume, all nodes must share --output_dir; to start anew, empty it"
        )
    return str(Path(output_dir) / f"checkpoint-{max(common)}") if common else None


def complete_steps(output_dir: str, rank: int, world_size: int) -> list[int]:
    """Steps of the checkpoints of which this rank finds what is written last: its random state, and the trainer's."""
    random_state = "rng_state.pth" if world_size == 1 else f"rng_state_{rank}.pth"
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        name = _NAME.fullmatch(path.name)
        if name and (path / random_state).is_file() and _is_json(path / "trainer_state.json"):
            found.append(int(name[1]))
    return sorted(found)


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


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return True

"""`python -m janusvln.export.merge CHECKPOINT OUT`: a model trained with LoRA, and its base, as one model.

Made from the files, one after the other: no more of the model is in memory than one of them.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from janusvln.export.directory import appearing, new_directory
from janusvln.export.layout import as_json
from janusvln.model import checkpoints, lora
from janusvln.model.checkpoints import ADAPTER_CONFIG, LEFT_OUT, name_in_model
from janusvln.model.config import JanusVLNConfig
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from vggt_cache.encoder.files import INDEX, TensorFile, find_files, read_json
from vggt_cache.errors import CheckpointError, SettingsError, VggtCacheError
from vggt_cache.output import print_any_name

_NOT_COPIED = re.compile(r"adapter_.*|non_lora_.*|trainer_state\.json|.*\.safetensors|training_args.*")


def merge(checkpoint: str, out: str, base: str | None = None) -> None:
    """Write the whole model to the new directory `out`, in the dtype that it was trained in.

    checkpoint: directory of a model trained with LoRA; base: the model that it was trained from, where that has
    moved. Raises CheckpointError, SettingsError, DiskSpaceError and FileAccessError; then there is no `out`.
    """
    target, trained = new_directory(out), Path(checkpoint).expanduser()
    if not lora.is_adapter(trained):
        raise SettingsError(
            f"{checkpoint} holds no LoRA adapters ({ADAPTER_CONFIG} and {lora.ADAPTER_WEIGHTS}), so there is "
            "nothing to merge: give a checkpoint that was trained with --lora_enable True"
        )
    named = base or str(read_json(trained / ADAPTER_CONFIG).get("base_model_name_or_path"))
    try:
        source = checkpoints.find_directory(named)
    except CheckpointError as error:
        raise SettingsError(
            f"{named}, which {checkpoint} was trained from, is not there: give --model_name_or_path where it is now"
        ) from error
    lora.check_base(trained, named, lora.digest_of(source))
    config = JanusVLNConfig.from_pretrained(str(trained))
    dtype: torch.dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    files = list(find_files(source))
    with appearing(target, _values(files) * dtype.itemsize) as directory:
        _write_weights(files, trained, directory, dtype)
        for path in trained.iterdir():
            if (
                path.is_file()
                and not _NOT_COPIED.fullmatch(path.name)
                and path.suffix in (".json", ".jinja", ".txt")
            ):
                shutil.copyfile(path, directory / path.name)
        found = checkpoints.open_checkpoint(directory)
        checkpoints.check(found, config, JanusVLN._shapes(config))
        checkpoints.share(directory)


def _values(files: Sequence[Path]) -> int:
    count = 0
    for path in files:
        with TensorFile(path) as file:
            count += sum(math.prod(entry.shape) for entry in file.entries.values())
    return count


def _write_weights(files: Sequence[Path], trained: Path, directory: Path, dtype: torch.dtype) -> None:
    deltas, others = lora.deltas_of(trained), load_file(trained / lora.OTHERS)
    count = len(files) + 1
    placed: dict[str, str] = {}
    total = 0
    for number in range(count):
        if number < len(files):
            weights = {
                name: _merged(name_in_model(name), weight, deltas, others).to(dtype)
                for name, weight in load_file(files[number]).items()
                if not any(re.search(pattern, name) for pattern in LEFT_OUT)
            }
        else:  # what the base does not have, such as the spatial merger
            weights = {name: weight.to(dtype) for name, weight in others.items()}
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file(weights, directory / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(weights, file)
        total += sum(weight.nbytes for weight in weights.values())
    if deltas:
        raise CheckpointError(
            f"{trained} has adapters for {next(iter(deltas))}, which its base does not hold: the checkpoint is damaged"
        )
    (directory / INDEX).write_text(as_json({"metadata": {"total_size": total}, "weight_map": placed}))


def _merged(
    name: str, weight: Tensor, deltas: dict[str, tuple[Tensor, Tensor]], others: dict[str, Tensor]
) -> Tensor:
    """A weight of the base as it is after training. What is used of the two is taken out of them."""
    if name in others:
        return others.pop(name)
    if name in deltas:
        b, a = deltas.pop(name)
        return weight.float() + b @ a
    return weight


def main(argv: Sequence[str] | None = None) -> int:
    """Merge; returns the exit code. A known error is one sentence."""
    print_any_name()
    parser = argparse.ArgumentParser(
        prog="python -m janusvln.export.merge",
        description="Make one model of a checkpoint that was trained with LoRA and the model it was trained from.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="directory that training with LoRA wrote")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument(
        "--model_name_or_path", help="what it was trained from, where that is not where it was then"
    )
    given = parser.parse_args(argv)
    try:
        merge(given.checkpoint, given.out, given.model_name_or_path)
    except VggtCacheError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        return error.exit_code
    print(f"[SUCCESS] Merged into {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

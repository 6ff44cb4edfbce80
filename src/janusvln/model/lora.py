"""LoRA (arXiv:2106.09685): the language model stays as it is, and learns through small matrices beside its own.

A checkpoint then holds what was trained, and names the model that was there before:

adapter_config.json, adapter_model.safetensors   the small matrices, as peft reads and writes them
non_lora_trainables.safetensors                  all else that was trained, the spatial merger first of all
config.json                                      of the whole model

`janusvln.export.merge` makes one model of both. peft is an optional package: only training with LoRA imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from janusvln.model.checkpoints import ADAPTER_CONFIG, name_in_model
from vggt_cache.encoder.checkpoint import WeightsDigest
from vggt_cache.encoder.files import TensorFile, find_files, read_json
from vggt_cache.errors import CheckpointError, SettingsError, errors_as

ADAPTER_WEIGHTS = "adapter_model.safetensors"
OTHERS = "non_lora_trainables.safetensors"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of the language model: all of them learn, unless the flags name some."""
RANK, ALPHA = 64, 128
MARK = ".lora_"
"""In the names of the small matrices, and in no other."""
NEEDED = "peft>=0.18"
_ADAPTER = "default"
_PREFIX = "base_model.model."
"""What peft puts before the model's names in its files."""


def need_peft() -> Any:
    """The package. Raises SettingsError where it is missing, or too old for this transformers."""
    fault = "--lora_enable True needs the package peft, and it cannot be imported"
    remedy = f": run {sys.executable} -m pip install --upgrade '{NEEDED}'"
    with errors_as(SettingsError, fault, remedy, ImportError):
        import peft
    return peft


def is_adapted(model: nn.Module) -> bool:
    return any(MARK in name for name, _ in model.named_parameters())


def add_adapters(
    model: Any,
    base: str,
    digest: str,
    *,
    r: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    targets: str | None = None,
) -> None:
    """Put the small matrices into the language model; at first they change nothing that it computes.

    base, digest: what the model was loaded from, as a checkpoint shall name it, and its `digest_of`. targets: names of
    linear layers, separated by commas. Raises SettingsError.
    """
    peft = need_peft()
    names = [name.strip() for name in targets.split(",")] if targets else list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        raise SettingsError(
            f"--lora_target_modules names {unknown[0]}, which is no linear layer of the language model: name some of "
            f"{','.join(TARGETS)}, or leave it out for all"
        )
    config = peft.LoraConfig(
        r=RANK if r is None else r,
        lora_alpha=ALPHA if alpha is None else alpha,
        lora_dropout=dropout or 0.0,
        # The vision tower has layers of the same names.
        target_modules=rf"model\.language_model\..*\.({'|'.join(names)})",
        base_model_name_or_path=base,
        task_type="CAUSAL_LM",
    )
    peft.LoraModel(model, config, _ADAPTER)
    model.lora_base_digest = digest


def save(model: Any, directory: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Everything that was trained, and the configuration. `state_dict`: as gathered from all processes."""
    weights = model.state_dict() if state_dict is None else state_dict
    directory.mkdir(parents=True, exist_ok=True)
    model.peft_config[_ADAPTER].save_pretrained(str(directory))
    adapters = {_in_file(name): weights[name] for name in weights if MARK in name}
    others = {name: weights[name] for name in _others(model)}
    save_file(_plain(adapters), directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    metadata = {"format": "pt", "base_digest": model.lora_base_digest}
    save_file(_plain(others), directory / OTHERS, metadata=metadata)
    model.config.dtype = next(iter(adapters.values())).dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(directory))


def load(model: Any, directory: Path) -> None:
    """Put back what `save` wrote, into a model with the same adapters. Raises CheckpointError."""
    found = load_file(directory / ADAPTER_WEIGHTS) | load_file(directory / OTHERS)
    named = {_in_file(name) if MARK in name else name: name for name in _trained(model)}
    wrong = sorted(found.keys() ^ named.keys())
    if wrong:
        raise CheckpointError(
            f"{directory} does not hold what this run trains ({wrong[0]} and {len(wrong) - 1} more differ), so nothing "
            "can be resumed from it: use the flags it was trained with, or an empty --output_dir"
        )
    model.load_state_dict({named[name]: weight for name, weight in found.items()}, strict=False)


def check_resumed(model: Any, directory: Path) -> None:
    """Raises SettingsError where the run that wrote a checkpoint trained otherwise, or from another model."""
    was, now = is_adapter(directory), is_adapted(model)
    if was != now:
        flag, other = ("with", "without") if was else ("without", "with")
        raise SettingsError(
            f"{directory} was trained {flag} LoRA, and this run is {other} it (--lora_enable {now}): start as it was "
            "started, or give another --output_dir"
        )
    if not now:
        return
    before, config = read_json(directory / ADAPTER_CONFIG), model.peft_config[_ADAPTER]
    for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
        if before.get(name) != getattr(config, name):
            raise SettingsError(
                f"{directory} was trained with LoRA's {name} {before.get(name)}, and this run has "
                f"{getattr(config, name)}: start as it was started, or give another --output_dir"
            )
    check_base(directory, config.base_model_name_or_path, model.lora_base_digest)


def check_base(directory: Path, base: str, digest: str) -> None:
    """Raises SettingsError unless the adapters in `directory` were trained on the model with this digest."""
    with safe_open(directory / OTHERS, "pt") as file:
        trained_on = (file.metadata() or {}).get("base_digest")
    if trained_on != digest:
        raise SettingsError(
            f"{base} is another model than the one that the adapters in {directory} were trained beside, and together "
            "they would answer wrongly without a word: give --model_name_or_path that one"
        )


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds adapters and not a whole model."""
    return (directory / ADAPTER_CONFIG).is_file() and (directory / ADAPTER_WEIGHTS).is_file()


def deltas_of(directory: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name of a weight in the model: float32 B [out, r] and A [r, in]; B @ A is what LoRA adds to it."""
    config = read_json(directory / ADAPTER_CONFIG)
    scale = config["lora_alpha"] / config["r"]
    weights = load_file(directory / ADAPTER_WEIGHTS)
    first = f"{MARK}A.weight"
    names = [name.removesuffix(first) for name in weights if name.endswith(first)]
    return {
        f"{name.removeprefix(_PREFIX)}.weight": (
            weights[f"{name}{MARK}B.weight"].float() * scale,
            weights[f"{name}{first}"].float(),
        )
        for name in names
    }


def digest_of(directory: Path) -> str:
    """sha256 (hex) over all weights of a model's files, whole, however they are cut into files.

    Whole, because a part would not tell: a short training with a small rate leaves most bfloat16 values as they were.
    It reads as much as loading the model does, one tensor at a time. Raises CheckpointError.
    """
    digest = WeightsDigest()
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(path)) for path in find_files(directory)]
        places = {name_in_model(name): (file, name) for file in files for name in file.entries}
        for own, (file, name) in sorted(places.items(), key=lambda place: place[0]):
            digest.add(own, file.read(name))
    return digest.hex()


def _trained(model: nn.Module) -> list[str]:
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def _others(model: nn.Module) -> list[str]:
    return [name for name in _trained(model) if MARK not in name]


def _in_file(name: str) -> str:
    return _PREFIX + name.replace(f".{_ADAPTER}.", ".")


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}

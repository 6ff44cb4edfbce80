"""The exported directory: every tensor is read once and written once, and nothing is visible before all is there."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from janusvln.export.layout import as_json, differences, processor_files, published_config, published_name
from janusvln.features.resolve import encoder_of, features_of
from janusvln.model import checkpoints
from janusvln.model.checkpoints import ModelCheckpoint
from janusvln.model.config import JanusVLNConfig
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from vggt_cache.context import CONTEXTS
from vggt_cache.encoder.files import CONFIG, DTYPES, INDEX, Entry, TensorFile, find_directory, find_files
from vggt_cache.errors import CheckpointError, DiskSpaceError, FileAccessError, SettingsError

VGGT_PARTS = ("aggregator.", "point_head.", "depth_head.")
"""Of VGGT, what JanusVLN's model keeps. It never runs the two heads."""


Weights = dict[str, Entry]
"""By their names in the export, where they are now."""


def export(checkpoint: str, out: str, vggt_model_path: str) -> list[str]:
    """Write the model in `checkpoint` to the new directory `out`; returns what the user should know of it.

    checkpoint: directory of a model trained here; vggt_model_path: the VGGT whose features it was trained with,
    a directory or a hub id. Weights keep their dtypes. Raises CheckpointError, SettingsError, DiskSpaceError and
    FileAccessError; then there is no `out`.
    """
    target = new_directory(out)
    found = checkpoints.open_checkpoint(checkpoint)
    config = checkpoints.configure(found, None, {})
    _check_features(found, config, vggt_model_path)
    checkpoints.check(found, config, JanusVLN._shapes(config))
    own, vggt = _own_weights(found), _vggt_weights(vggt_model_path)
    texts = processor_files(found.directory)
    _check_dtypes(own | vggt)
    texts[CONFIG] = as_json(published_config(config, _dtype_of(own)))
    with appearing(target, _bytes(own | vggt)) as directory:
        texts[INDEX] = as_json(_write_weights(own | vggt, directory))
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    told = differences(config)
    if not all(any(name.startswith(f"vggt.{part}") for name in vggt) for part in VGGT_PARTS):
        told.append(
            f"{vggt_model_path} has no point_head and depth_head: JanusVLN's code will say that it makes them anew, "
            "which changes nothing, as it never runs them"
        )
    return told


def _check_features(found: ModelCheckpoint, config: JanusVLNConfig, vggt_model_path: str) -> None:
    """The features of JanusVLN's evaluation must be those that this model was trained with."""
    spec = features_of(found.location, config.feature_spec)
    if not CONTEXTS[spec["context"]].shares_prefixes:  # which frames that come one by one need
        raise CheckpointError(
            f"{found.location} was trained with features of context {spec['context']}, and JanusVLN's code computes "
            "causal ones, so its answers would be wrong without a word: evaluate it with python -m janusvln.serve"
        )
    vggt = encoder_of(found.location, spec, vggt_model_path)
    published = vggt.config.absolute_layer(-2)
    if vggt.layer != published:
        raise CheckpointError(
            f"{found.location} was trained with features of layer {vggt.layer}, and JanusVLN's code takes layer "
            f"{published}, the last but one: evaluate it with python -m janusvln.serve"
        )


def _own_weights(found: ModelCheckpoint) -> Weights:
    named = {checkpoints.name_in_model(entry.name): entry for entry in _entries(found.directory)}
    return {
        published_name(name): entry
        for name, entry in named.items()
        if name in found.shapes and not name.startswith("action_head.")
    }


def _vggt_weights(location: str) -> Weights:
    named = {entry.name.removeprefix("vggt."): entry for entry in _entries(find_directory(location))}
    return {f"vggt.{name}": entry for name, entry in named.items() if name.startswith(VGGT_PARTS)}


def _entries(directory: Path) -> Iterator[Entry]:
    for path in find_files(directory):
        with TensorFile(path) as file:
            yield from file.entries.values()


def _check_dtypes(weights: Weights) -> None:
    for entry in weights.values():
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                f"{entry.path} holds {entry.name} in {entry.dtype}, which is none of {', '.join(DTYPES)}: quantised "
                "weights cannot be exported; use the checkpoint that training wrote"
            )


def _dtype_of(weights: Weights) -> str:
    """As transformers names it; float32 where there are several."""
    dtypes = {DTYPES[entry.dtype] for entry in weights.values()}
    return str(dtypes.pop() if len(dtypes) == 1 else torch.float32).removeprefix("torch.")


def _bytes(weights: Weights) -> int:
    return sum(entry.end - entry.begin for entry in weights.values())


def _write_weights(weights: Weights, directory: Path) -> dict[str, Any]:
    """One file for each file that they are in now; returns the index of all."""
    by_file: dict[Path, Weights] = {}
    for name, entry in weights.items():
        by_file.setdefault(entry.path, {})[name] = entry
    placed = {}
    for number, (source, inside) in enumerate(by_file.items(), 1):
        file = f"model-{number:05d}-of-{len(by_file):05d}.safetensors"
        _write_file(directory / file, source, inside)
        placed.update(dict.fromkeys(inside, file))
    return {"metadata": {"total_size": _bytes(weights)}, "weight_map": placed}


def _write_file(target: Path, source: Path, weights: Weights) -> None:
    """A safetensors file: 8 bytes of header length, header, tensors (github.com/huggingface/safetensors)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, entry in weights.items():
        offsets = [at, at := at + entry.end - entry.begin]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with TensorFile(source) as read, open(target, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in weights.values():
            file.write(read.read(entry.name).flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def new_directory(out: str) -> Path:
    target = Path(out).expanduser().absolute()
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise SettingsError(
            f"{out} exists and is not empty, and nothing is overwritten: give a new directory, or remove that one"
        )
    return target


@contextmanager
def appearing(target: Path, needed_bytes: int) -> Iterator[Path]:
    """A directory to fill, which then becomes `target`; all of it goes where that fails."""
    pending = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise DiskSpaceError(
                f"{target} needs {needed_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free there: make room, or "
                "give a directory on another disk"
            )
        pending.mkdir()
        yield pending
        os.rename(pending, target)
    except BaseException as error:
        shutil.rmtree(pending, ignore_errors=True)
        if isinstance(error, OSError):
            raise FileAccessError(
                target, f"cannot be written ({error.strerror or error}): check the disk and its permissions"
            ) from error
        raise

"""The aggregator's weights out of a pickle (`.pt`, `.pth`, `.bin`) or a checkpoint, into one as it is read here.

The one place that opens a pickle, because a user asks for it by name. torch's loader for weights alone builds tensors
and plain containers, and refuses whatever else the file names; it runs in a process of its own, which ends with it.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import save_file

from vggt_cache.encoder.checkpoint import VGGT_PREFIX, Checkpoint, below_prefix, infer_config
from vggt_cache.encoder.files import CONFIG, WEIGHTS, TensorFile, find_files
from vggt_cache.errors import CheckpointError, SettingsError, os_errors_as

_PARTIAL = f"{WEIGHTS}.partial"


def convert_checkpoint(source: str, directory: str, dtype: str | None = None) -> int:
    """Write `config.json` and `model.safetensors` of the VGGT in `source`, a pickle or a directory, into `directory`.

    Its weights get the official names. They keep their bytes, or are rounded to `dtype`, as trainers do that train in
    bfloat16: features of such weights are other features. Heads and other models in the file are left out.
    Raises CheckpointError where the file is no VGGT, or holds more than weights; SettingsError for the places.
    """
    target = Path(directory)
    if not os.path.exists(source):
        raise SettingsError(
            f"there is no {source}, so there is nothing to convert: give the .pt, .pth or .bin file, or the "
            "directory of a checkpoint"
        )
    with os_errors_as(SettingsError, f"{directory} cannot be written", ": name a directory that can"):
        if (target / WEIGHTS).exists() or (target / CONFIG).exists():
            raise SettingsError(
                f"{directory} holds a checkpoint already, which is not written over: name another place"
            )
        target.mkdir(parents=True, exist_ok=True)
    spawned = multiprocessing.get_context("spawn")
    here, there = spawned.Pipe(duplex=False)
    child = spawned.Process(target=_write, args=(source, directory, dtype, there))
    child.start()
    there.close()
    try:
        reason = here.recv_bytes().decode()
    except EOFError:
        child.join()
        reason = (
            f"the process that loaded {source} ended (code {child.exitcode}) before it was done: the file is damaged, "
            "or larger than this machine's memory; download it again, or convert it on another machine"
        )
    child.join()
    if reason:
        (target / _PARTIAL).unlink(missing_ok=True)
        raise CheckpointError(reason)
    os.replace(target / f"{CONFIG}.partial", target / CONFIG)
    os.replace(target / _PARTIAL, target / WEIGHTS)
    config = Checkpoint.open(directory).config
    print(
        f"[SUCCESS] {directory} holds the VGGT of {source}: {config.depth} pairs, {config.embed_dim} channels"
    )
    return 0


def _write(source: str, directory: str, dtype: str | None, answer: Connection) -> None:
    """In the process of its own. Answers with why it cannot be done; nothing where it is."""
    try:
        weights = dict(_tensors(_load(source)))
        _, weights = below_prefix(source, weights)
        config = infer_config(Path(source), {name: tuple(weight.shape) for name, weight in weights.items()})
        kind = getattr(torch, dtype) if dtype else None
        # Copied: in the file, several weights may share their bytes.
        official = {
            VGGT_PREFIX + name: weight.detach().to(kind or weight.dtype, copy=True).contiguous()
            for name, weight in weights.items()
        }
        save_file(official, Path(directory) / _PARTIAL)
        (Path(directory) / f"{CONFIG}.partial").write_text(
            json.dumps(dataclasses.asdict(config), indent=2) + "\n"
        )
    except (CheckpointError, OSError) as error:
        answer.send_bytes(str(error).encode())
    except RecursionError:
        answer.send_bytes(
            f"{source} holds a dictionary that holds itself, as no weights do: save its state_dict() by itself".encode()
        )
    else:
        answer.send_bytes(b"")


def _load(source: str) -> object:
    if os.path.isdir(source):
        return dict(_of_a_checkpoint(Path(source)))
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # the loader says what it refuses by errors of many types
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {named[1]}, which is no tensor" if named else type(error).__name__
        raise CheckpointError(
            f"{source} cannot be loaded as weights alone ({what}), and more is never loaded: get the weights as "
            f"{WEIGHTS} from where the file comes from, or save its state_dict() by itself"
        ) from error


def _of_a_checkpoint(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in find_files(directory):
        with TensorFile(path) as file:
            for name in file.entries:
                if VGGT_PREFIX in name:  # of a whole model the rest need not fit into memory
                    yield name, file.read(name)


def _tensors(found: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """By their names: those of nested dictionaries (`model`, `state_dict`) with dots between them."""
    if isinstance(found, torch.Tensor):
        yield name, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _tensors(value, f"{name}.{key}" if name else str(key))

"""From what the user names to safetensors files: a directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from vggt_cache.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_JSON_BYTES = 64 << 20


def find_directory(location: str) -> Path:
    """`location` as a local directory; a hub id that names no local path is downloaded. Raises CheckpointError."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        reason = _why_no_pickle(path.name) if path.suffix in _PICKLES else "a checkpoint is a directory"
        raise CheckpointError(
            f"{location} is a file: {reason}; give the directory that holds {CONFIG} and {WEIGHTS}, or a hub id "
            "such as facebook/VGGT-1B"
        )
    if _HUB_ID.fullmatch(location):
        return _download(location)
    raise CheckpointError(
        f"{location} does not exist: give the directory that holds {CONFIG} and {WEIGHTS}, or a hub id such as "
        "facebook/VGGT-1B"
    )


def find_files(directory: Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files of a checkpoint; for shards, the names that the index expects in each.

    Raises CheckpointError when there are none, or when the index is broken or points at files that are absent
    or elsewhere.
    """
    if (directory / WEIGHTS).is_file():
        return {directory / WEIGHTS: None}
    if (directory / INDEX).is_file():
        return _shards(directory)
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{directory} holds {pickles[0]} but no {WEIGHTS}: {_why_no_pickle(pickles[0])}"
        )
    raise CheckpointError(
        f"{directory} holds neither {WEIGHTS} nor {INDEX} (it holds {', '.join(names[:5]) or 'no files'}): it is not a "
        f"VGGT checkpoint; get {CONFIG} and {WEIGHTS} from facebook/VGGT-1B"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is over {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}): download or copy it again"
        ) from error
    return value


def _why_no_pickle(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is loaded, so it is never opened here; download "
        f"{WEIGHTS} from facebook/VGGT-1B, or convert it once where you trust it (load it in torch with "
        f"weights_only=True and write it with safetensors.torch.save_file to {WEIGHTS})"
    )


def _shards(directory: Path) -> dict[Path, frozenset[str] | None]:
    placed = read_json(directory / INDEX).get("weight_map")
    if (
        not isinstance(placed, dict)
        or not placed
        or not all(isinstance(file, str) for file in placed.values())
    ):
        raise CheckpointError(
            f"{directory / INDEX} has no weight_map from names to files: download or copy it again"
        )
    names: dict[str, set[str]] = {}
    for name, file in placed.items():
        names.setdefault(file, set()).add(name)
    for file in sorted(names):
        if os.path.basename(file) != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{directory / INDEX} names {file!r}, which is not a plain name of a safetensors file beside it: such "
                "an index may point anywhere; use one from a source that you trust"
            )
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{directory / INDEX} names {file}, which is not there: the checkpoint is incomplete; download or copy "
                "it again"
            )
    return {directory / file: frozenset(inside) for file, inside in sorted(names.items())}


def _download(repository: str) -> Path:
    # Imported here: it takes long, and most runs name a directory.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=[CONFIG, "*.safetensors", INDEX]))
    # Whatever the network library of the installed version raises, it means the same to the user.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{repository} is neither an existing directory nor a repository that could be downloaded from the "
            f"Hugging Face hub ({type(error).__name__}: {reason}): correct the path, or check the id, the network "
            "and, for a gated repository, your login"
        ) from error

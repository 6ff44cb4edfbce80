"""A checkpoint's files: found from what the user names, and read tensor by tensor.

Safetensors (https://github.com/huggingface/safetensors, section Format): 8 bytes little-endian header length, a JSON
header, the tensors' bytes. Plain reads instead of a memory map: a file that shrinks under a map kills the process
without a word, and pages of a map count as memory of the process.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_cache.errors import CheckpointError, errors_as, os_errors_as

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The only dtypes that weights may have."""
MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors library."""
_MAX_JSON_BYTES = 64 << 20
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_directory(location: str) -> Path:
    """`location` as a local directory; a hub id that names no local path is downloaded. Raises CheckpointError."""
    path = Path(location).expanduser()
    if path.is_dir():
        return path
    if not path.exists() and HUB_ID.fullmatch(location):
        return download(location, [CONFIG, "*.safetensors", INDEX])
    why = _why_no_pickle(path.name) if path.suffix in _PICKLES else "a checkpoint is a directory"
    problem = f"is a file: {why};" if path.exists() else "does not exist:"
    raise CheckpointError(
        f"{location} {problem} give the directory that holds {CONFIG} and {WEIGHTS}, or a hub id such as "
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
    fault, remedy = f"{path} cannot be read as JSON", ": download or copy it again"
    with errors_as(CheckpointError, fault, remedy, OSError, ValueError, RecursionError):
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it is over {_MAX_JSON_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        return value


def _why_no_pickle(name: str) -> str:
    return (
        f"{name} is a pickle, which can run any code when it is loaded, so it is never opened here; download "
        f"{WEIGHTS} from facebook/VGGT-1B, or convert it once where you trust it: vggt-cache convert-checkpoint "
        f"{name} DIRECTORY"
    )


def _shards(directory: Path) -> dict[Path, frozenset[str] | None]:
    index = directory / INDEX
    placed = read_json(index).get("weight_map")
    if (
        not placed
        or not isinstance(placed, dict)
        or not all(isinstance(file, str) for file in placed.values())
    ):
        raise CheckpointError(f"{index} has no weight_map from names to files: download or copy it again")
    names: dict[str, set[str]] = {}
    for name, file in placed.items():
        names.setdefault(file, set()).add(name)
    for file in sorted(names):
        if os.path.basename(file) != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names {file!r}, which is not a plain name of a safetensors file beside it: such "
                "an index may point anywhere; use one from a source that you trust"
            )
        if not (directory / file).is_file():
            raise CheckpointError(
                f"{index} names {file}, which is not there: the checkpoint is incomplete; download or copy it again"
            )
    return {directory / file: frozenset(inside) for file, inside in sorted(names.items())}


def download(repository: str, patterns: Sequence[str], **hub: Any) -> Path:
    """The files of a hub's repository. `hub`: cache_dir, revision, token. Raises CheckpointError."""
    # Imported here: it takes long, and most runs name a directory.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), **hub))
    # Whatever the network library of the installed version raises, it means the same to the user.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise CheckpointError(
            f"{repository} is neither an existing directory nor a repository that could be downloaded from the "
            f"Hugging Face hub ({type(error).__name__}: {reason}): correct the path, or check the id, the network "
            "and, for a gated repository, your login"
        ) from error


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor in a file. `begin` and `end` are byte offsets."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """An open safetensors file. `entries`: name to entry. Use as a context manager.

    Raises CheckpointError for a file that cannot be read or is no complete safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._named_errors(), ExitStack() as stack:
            self._file = stack.enter_context(FileIO(path))
            self.entries = _parse_header(path, self._file)
            stack.pop_all()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype (one of DTYPES), on the CPU."""
        entry = self.entries[name]
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        view = data.numpy().data
        with self._named_errors():
            self._file.seek(entry.begin)
            while view:
                count = self._file.readinto(view)
                if not count:
                    raise CheckpointError(
                        f"{self.path} became shorter while it was read: leave it alone, and start again"
                    )
                view = view[count:]
        return data.view(DTYPES[entry.dtype]).view(entry.shape)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        fault = f"{self.path} is not a complete safetensors file"
        meaning = ": it is truncated, damaged or of another format; download or copy it again"
        remedy = ": check the file and its permissions"
        with (
            errors_as(CheckpointError, fault, meaning, ValueError, TypeError, KeyError, RecursionError),
            os_errors_as(CheckpointError, f"{self.path} cannot be read", remedy),
        ):
            yield


def _parse_header(path: Path, file: FileIO) -> dict[str, Entry]:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{size} bytes do not hold a header of {length} bytes")
    fields = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(fields, dict):
        raise ValueError("the header is not a JSON object")
    fields.pop("__metadata__", None)
    entries = {name: _entry(path, name, field, 8 + length) for name, field in fields.items()}
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if needed != size:
        raise ValueError(f"it has {size} bytes where its header names {needed}")
    return entries


def _entry(path: Path, name: str, field: dict[str, Any], start: int) -> Entry:
    dtype, shape, (begin, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    counts = (*shape, begin, end)
    if not (isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in counts) and begin <= end):
        raise ValueError(f"the entry of {name!r} has impossible values")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the bytes of {name!r} do not match its shape")
    return Entry(path=path, name=name, dtype=dtype, shape=shape, begin=start + begin, end=start + end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return fields

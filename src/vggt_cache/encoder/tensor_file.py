"""Reading a safetensors file tensor by tensor.

Plain reads instead of a memory map: a file that shrinks under a map kills the process without a word,
and pages of a map count as memory of the process. Format: 8 bytes little-endian header length, a JSON
header, the tensors' bytes (https://github.com/huggingface/safetensors, section Format).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_cache.errors import CheckpointError

MAX_HEADER_BYTES = 100 << 20
"""The limit of the safetensors library."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The only dtypes that weights may have."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """One line of a header. `begin` and `end` are byte offsets in the file."""

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
        try:
            self._file = FileIO(path)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self.entries = self._parse()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, name: str) -> Tensor:
        """The tensor in its own dtype (one of DTYPES), on the CPU."""
        entry = self.entries[name]
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8, device="cpu")
        try:
            self._fill(data.numpy().data, entry.begin)
        except OSError as error:
            raise self._unreadable(error) from error
        return data.view(DTYPES[entry.dtype]).view(entry.shape)

    def _fill(self, view: memoryview, offset: int) -> None:
        self._file.seek(offset)
        while view:
            count = self._file.readinto(view)
            if not count:
                raise CheckpointError(
                    f"{self.path} became shorter while it was read: leave it alone, and start again"
                )
            view = view[count:]

    def _parse(self) -> dict[str, TensorEntry]:
        try:
            return _parse_header(self._file)
        except OSError as error:
            raise self._unreadable(error) from error
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} is not a complete safetensors file ({error}): it is truncated, damaged or of another "
                "format; download or copy it again"
            ) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path} cannot be read ({error.strerror or error}): check the file and its permissions"
        )


def _parse_header(file: FileIO) -> dict[str, TensorEntry]:
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{size} bytes do not hold a header of {length} bytes")
    fields = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(fields, dict):
        raise ValueError("the header is not a JSON object")
    fields.pop("__metadata__", None)
    entries = {name: _entry(name, field, 8 + length) for name, field in fields.items()}
    needed = max((entry.end for entry in entries.values()), default=8 + length)
    if needed != size:
        raise ValueError(f"it has {size} bytes where its header names {needed}")
    return entries


def _entry(name: str, field: dict[str, Any], start: int) -> TensorEntry:
    dtype, shape, (begin, end) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
    counts = (*shape, begin, end)
    if (
        not isinstance(dtype, str)
        or not all(type(count) is int and count >= 0 for count in counts)
        or begin > end
    ):
        raise ValueError(f"the entry of {name!r} has impossible values")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"the bytes of {name!r} do not match its shape")
    return TensorEntry(dtype=dtype, shape=shape, begin=start + begin, end=start + end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return fields

"""What goes into a module and comes out of it, as bytes: inputs to be hashed, outputs to be stored and rebuilt.

An output is a tensor, or a tuple, list, mapping or transformers' ModelOutput of such. As a record: u32 length of a JSON
text, the text, then the tensors' bytes, each from a multiple of 64 bytes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vggt_cache.call_spec import ROW_BYTES
from vggt_cache.errors import CorruptRecordError, SettingsError, errors_as
from vggt_cache.store.tensors import bytes_of

_ALIGNMENT = 64
_MAX_COLUMNS = 65535
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
Leaves = list[Tensor]
_PLAIN = (str, bytes, int, float, bool, type(None), torch.dtype, torch.device)


def flat_inputs(value: Any, leaves: Leaves) -> Any:
    """The same with a number in place of each tensor, which goes into `leaves`. Raises SettingsError."""
    if isinstance(value, Tensor):
        leaves.append(value)
        return f"tensor {len(leaves) - 1}"
    if isinstance(value, Mapping):
        return {"map": [[repr(name), flat_inputs(part, leaves)] for name, part in sorted(value.items())]}
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *(flat_inputs(part, leaves) for part in value)]
    if isinstance(value, _PLAIN):
        return {"value": repr(value)}
    raise SettingsError(
        f"an argument of type {type(value).__name__} is given to the module, and only tensors, numbers, texts, and "
        "lists or mappings of them can be part of a cache's key: call the module without it"
    )


def with_leaves(value: Any, leaves: Iterator[Tensor]) -> Any:
    """Inputs of the same form with other tensors, in the order of `flat_inputs`."""
    if isinstance(value, Tensor):
        return next(leaves)
    if isinstance(value, Mapping):
        return {name: with_leaves(part, leaves) for name, part in sorted(value.items())}
    if isinstance(value, (tuple, list)):
        parts = [with_leaves(part, leaves) for part in value]
        return tuple(parts) if isinstance(value, tuple) else parts
    return value


def input_key(fingerprint: str, form: Any, leaves: Sequence[Tensor]) -> bytes:
    """16 bytes: of the module's identity, and of all that it was called with."""
    hasher = hashlib.sha256(b"vggt-feature-cache call 1\0" + bytes.fromhex(fingerprint))
    hasher.update(json.dumps(form).encode())
    for leaf in leaves:
        hasher.update(json.dumps([str(leaf.dtype), list(leaf.shape)]).encode())
        hasher.update(bytes_of(leaf.detach().cpu().contiguous()))
    return hasher.digest()[:16]


# ---------------------------------------------------------------- outputs


def take_apart(output: Any, leaves: Leaves) -> Any:
    """The form of an output as JSON takes it; its tensors go into `leaves`. Raises SettingsError."""
    if output is None:
        return None
    if isinstance(output, Tensor):
        leaves.append(output)
        return len(leaves) - 1
    if type(output) in (tuple, list):
        return {type(output).__name__: [take_apart(part, leaves) for part in output]}
    if isinstance(output, dict) and all(isinstance(name, str) for name in output):
        kind = type(output)
        named = [[name, take_apart(part, leaves)] for name, part in output.items()]
        return {"class": "dict" if kind is dict else f"{kind.__module__}:{kind.__qualname__}", "items": named}
    raise SettingsError(
        f"the module's output has a part of type {type(output).__name__}, and only tensors, tuples, lists and mappings "
        "of them are kept: wrap the part of the module that gives tensors"
    )


def put_together(form: Any, leaves: Sequence[Tensor], package: str) -> Any:
    """The output. Its own mappings may be classes of `package`, which the wrapped module comes from."""
    if form is None or isinstance(form, int):
        return None if form is None else leaves[form]
    if "class" not in form:
        ((kind, parts),) = form.items()
        return {"tuple": tuple, "list": list}[kind](put_together(part, leaves, package) for part in parts)
    named = {name: put_together(part, leaves, package) for name, part in form["items"]}
    return named if form["class"] == "dict" else _mapping_class(form["class"], package)(**named)


def _mapping_class(name: str, package: str) -> type:
    """No module is imported for a name that stands in a file."""
    home, _, qualname = name.partition(":")
    kind = getattr(sys.modules.get(home), qualname, None)
    if home.partition(".")[0] == package and isinstance(kind, type) and issubclass(kind, OrderedDict):
        return kind
    raise CorruptRecordError(
        f"a stored output is of class {name[:100]!r}, which the package {package} that the module comes from does not "
        "have now: it was written with another version; use another cache directory"
    )


def to_record(form: Any, leaves: Sequence[Tensor]) -> Tensor:
    """uint8 [h, w, ROW_BYTES] on the CPU."""
    unknown = [leaf.dtype for leaf in leaves if leaf.dtype not in DTYPES.values()]
    if unknown:
        raise SettingsError(
            f"the module's output has a tensor of {unknown[0]}, which is not kept: wrap another part of it"
        )
    kinds = [[str(leaf.dtype).removeprefix("torch."), list(leaf.shape)] for leaf in leaves]
    text = json.dumps({"form": form, "tensors": kinds}, separators=(",", ":")).encode()
    begins, end = _places(4 + len(text), kinds)
    rows = -(-end // ROW_BYTES)
    h = -(-rows // _MAX_COLUMNS)
    record = torch.zeros(h * -(-rows // h) * ROW_BYTES, dtype=torch.uint8, device="cpu")
    memory = record.numpy().data
    memory[:4] = len(text).to_bytes(4, "little")
    memory[4 : 4 + len(text)] = text
    for begin, leaf in zip(begins, leaves, strict=True):
        memory[begin : begin + leaf.nbytes] = bytes_of(leaf.detach().cpu().contiguous())
    return record.view(h, -1, ROW_BYTES)


def from_record(record: Tensor, device: torch.device) -> tuple[Any, Leaves]:
    """Form and tensors, on `device`, of the record's own memory. Raises CorruptRecordError."""
    flat = record.reshape(-1)
    fault = "a stored output of a module cannot be understood"
    meaning = ": it was written by another version of this project; use another cache directory"
    with errors_as(CorruptRecordError, fault, meaning, ValueError, TypeError, KeyError, RuntimeError):
        length = int.from_bytes(bytes(flat[:4].tolist()), "little")
        text = json.loads(flat[4 : 4 + length].numpy().tobytes())
        begins, end = _places(4 + length, text["tensors"])
        if end > len(flat):
            raise ValueError("it is shorter than its tensors")
        leaves = [
            flat[begin : begin + _nbytes(dtype, shape)].view(DTYPES[dtype]).view(shape)
            for begin, (dtype, shape) in zip(begins, text["tensors"], strict=True)
        ]
        return text["form"], [leaf.to(device) for leaf in leaves]


def _places(begin: int, kinds: Sequence[Any]) -> tuple[list[int], int]:
    begins = []
    for dtype, shape in kinds:
        begins.append(-(-begin // _ALIGNMENT) * _ALIGNMENT)
        begin = begins[-1] + _nbytes(dtype, shape)
    return begins, begin


def _nbytes(dtype: str, shape: Sequence[int]) -> int:
    if any(type(side) is not int or side < 0 for side in shape):
        raise ValueError("a shape is damaged")
    return math.prod(shape) * DTYPES[dtype].itemsize

"""Features as torch tensors and as bytes, without a copy between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vggt_cache.errors import SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.format import ALIGNMENT_BYTES
from vggt_cache.store.record import sides_of

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.uint8,
    "int8": torch.bfloat16,  # what is given to the store and comes back
}


def empty_feature(spec: FeatureSpec, shape: Sequence[int]) -> torch.Tensor:
    """Uninitialised memory for a feature of this shape on the CPU, whatever torch's default device is."""
    return at_a_page(shape, TORCH_DTYPES[spec.feature_dtype])


def at_a_page(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised CPU memory that begins at a page, as reads past the page cache need."""
    length = math.prod(shape) * dtype.itemsize
    memory = torch.empty(length + ALIGNMENT_BYTES, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + length].view(dtype).view(tuple(shape))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def readable_bytes(feature: torch.Tensor, spec: FeatureSpec) -> tuple[tuple[int, int, int], memoryview]:
    """h, w and frames, and the bytes, row-major, of a feature to be stored. Raises SettingsError for another form."""
    dtype = TORCH_DTYPES[spec.feature_dtype]
    try:
        if feature.dtype == dtype and feature.is_cpu:
            return sides_of(spec, feature.shape), bytes_of(feature.contiguous())
    except ValueError:
        pass
    raise SettingsError(
        f"a tensor of shape {list(feature.shape)} and {feature.dtype} on {feature.device} is no feature of this "
        f"store: it keeps [{', '.join(map(str, spec.axes))}] of {dtype}, taken from the CPU"
    )


def check_target(out: torch.Tensor, spec: FeatureSpec, shape: tuple[int, ...]) -> None:
    """Whether a feature of this shape can be read into `out`. Raises SettingsError."""
    dtype = TORCH_DTYPES[spec.feature_dtype]
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_cpu or not out.is_contiguous():
        raise SettingsError(
            f"out has shape {list(out.shape)} and {out.dtype} on {out.device}, and the feature needs a contiguous "
            f"{list(shape)} of {dtype} on the CPU: give such a tensor, or none"
        )


def bytes_for(length: int, out: torch.Tensor | None) -> torch.Tensor:
    """uint8 [length] on the CPU: the first bytes of `out` where it is given. Raises SettingsError for an unfit one."""
    if out is None:
        return at_a_page([length], torch.uint8)
    if out.dtype != torch.uint8 or out.ndim != 1 or not out.is_cpu or len(out) < length or out.stride(0) != 1:
        raise SettingsError(
            f"out has shape {list(out.shape)} and {out.dtype} on {out.device}, and the record needs a contiguous "
            f"[{length}] of torch.uint8 on the CPU, or more: give such a tensor, or none"
        )
    return out[:length]

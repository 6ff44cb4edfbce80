"""Features as torch tensors and as bytes, without a copy between the two."""

from __future__ import annotations

import torch

from vggt_cache.errors import SettingsError
from vggt_cache.identity import FeatureSpec

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.bfloat16,  # what is given to the store and comes back
}


def empty_feature(spec: FeatureSpec, h: int, w: int) -> torch.Tensor:
    """Uninitialised memory for a feature [h, w, C] on the CPU."""
    return torch.empty((h, w, spec.encoder.channels), dtype=TORCH_DTYPES[spec.feature_dtype])


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def readable_bytes(feature: torch.Tensor, spec: FeatureSpec) -> tuple[int, int, memoryview]:
    """h, w and the bytes, row-major, of a feature to be stored. Raises SettingsError for another form."""
    dtype, channels = TORCH_DTYPES[spec.feature_dtype], spec.encoder.channels
    if feature.ndim != 3 or feature.shape[2] != channels or feature.dtype != dtype or feature.is_cuda:
        raise SettingsError(
            f"a tensor of shape {list(feature.shape)} and {feature.dtype} on {feature.device} is no feature of this "
            f"store: it keeps [h, w, {channels}] of {dtype}, taken from the CPU"
        )
    return feature.shape[0], feature.shape[1], bytes_of(feature.contiguous())


def check_target(out: torch.Tensor, spec: FeatureSpec, h: int, w: int) -> None:
    """Whether a feature of h x w patches can be read into `out`. Raises SettingsError."""
    shape, dtype = (h, w, spec.encoder.channels), TORCH_DTYPES[spec.feature_dtype]
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_cpu or not out.is_contiguous():
        raise SettingsError(
            f"out has shape {list(out.shape)} and {out.dtype} on {out.device}, and the feature needs a contiguous "
            f"{list(shape)} of {dtype} on the CPU: give such a tensor, or none"
        )


class ReusedMemory:
    """Bytes that are used again and again, grown as needed: fresh memory costs a page fault each 4 KiB.

    They start at a multiple of 64 bytes, as torch's do. Some processors copy several times more slowly to a place that
    lies 1 to 31 bytes further in its page than the source does in its own, and records lie at the start of pages,
    while large memory of bytearray and numpy starts 16 or 32 bytes behind it.
    """

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, length: int) -> memoryview:
        """Memory of so many bytes, of any content, valid until the next call."""
        if len(self._bytes) < length:
            self._bytes = bytes_of(torch.empty(length, dtype=torch.uint8))
        return self._bytes[:length]

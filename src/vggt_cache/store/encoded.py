"""Features that are kept in int8, read as they lie in the store: half of the bytes travel to the device."""

from __future__ import annotations

import torch

from vggt_cache.codec import INT8
from vggt_cache.codec.quantise import EncodedFeature
from vggt_cache.errors import SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.rows import Record
from vggt_cache.store.tensors import bytes_of
from vggt_cache.store.view import StoreView


def read_encoded(
    view: StoreView, spec: FeatureSpec, key: bytes, out: torch.Tensor | None
) -> EncodedFeature | None:
    """See `FeatureCache.get_encoded`."""
    if spec.feature_dtype != INT8:
        raise SettingsError(
            f"this cache keeps its features in {spec.feature_dtype}, not in {INT8}: use get_by_key"
        )
    found: EncodedFeature | None = None

    def memory_for(record: Record, length: int) -> memoryview:
        nonlocal found
        memory = bytes_for(length, out)
        found = EncodedFeature(record=memory, h=record.h, w=record.w, channels=spec.encoder.channels)
        return bytes_of(memory)

    return found if view.read_stored(key, memory_for) else None


def bytes_for(length: int, out: torch.Tensor | None) -> torch.Tensor:
    """uint8 [length] on the CPU: the first bytes of `out` where it is given. Raises SettingsError if it is unfit."""
    if out is None:
        return torch.empty(length, dtype=torch.uint8)
    if out.dtype != torch.uint8 or out.ndim != 1 or out.is_cuda or len(out) < length or out.stride(0) != 1:
        raise SettingsError(
            f"out has shape {list(out.shape)} and {out.dtype} on {out.device}, and the record needs a contiguous "
            f"[{length}] of torch.uint8 on the CPU, or more: give such a tensor, or none"
        )
    return out[:length]

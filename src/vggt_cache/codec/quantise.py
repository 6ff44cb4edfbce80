"""The arithmetic of int8 features, in torch: on the CPU, or on the device that trains."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cache.codec import INT8
from vggt_cache.codec.base import NORMALISER_BYTES, SCALE_BYTES
from vggt_cache.errors import SettingsError

_LEVELS = 127
_PEAK_OVER_MEAN = 16.0
"""A channel is normalised by its largest value, but by no more than this many times its mean absolute value: else
one massive activation would leave the channel's other tokens a few levels only."""
_UNIT_OF_POWER = 2.0**-20
_EXPONENT = 0x7F800000
"""Of a float32: what these bits alone stand for is the power of two under it."""
_LEAST_POWER = 2.0**-126
_ROWS = 128
"""Tokens decoded at a time on a CPU, so that float32 values stay in the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class EncodedFeature:
    """An int8 feature as it lies in the store, its checksum found right."""

    record: Tensor
    """uint8, one dimension, contiguous, on any device."""
    shape: tuple[int, ...]
    """Of the feature, channels last."""

    def decode(self, *, out: Tensor | None = None) -> Tensor:
        """The feature, bfloat16, on the CPU; into `out`, which is contiguous, where it is given."""
        feature = torch.empty(self.shape, dtype=torch.bfloat16, device="cpu") if out is None else out
        if feature.shape != self.shape or feature.dtype != torch.bfloat16 or not feature.is_contiguous():
            raise SettingsError(
                f"out has shape {list(feature.shape)} and {feature.dtype}, and the feature needs a contiguous "
                f"{list(self.shape)} of torch.bfloat16: give such a tensor, or none"
            )
        decode_rows(self.record.cpu(), feature.view(-1, self.shape[-1]))
        return feature

    def decode_on(self, device: torch.device | str) -> Tensor:
        """The feature, bfloat16, on `device`; half of its bytes travel there.

        From a pinned `record` the copy does not wait; keep that memory as it is until the device has it.
        """
        record = self.record.to(device, non_blocking=True)
        return decode_int8(record, math.prod(self.shape[:-1]), self.shape[-1]).view(self.shape)


def as_stored(feature: Tensor, feature_dtype: str) -> Tensor:
    """A computed feature [..., C] as it would come back from the cache: a lossy storage dtype changes it.

    One that is not finite is never stored, and stays as it is. Nothing waits for the device.
    """
    if feature_dtype != INT8:
        return feature
    tokens = feature.flatten(0, -2)
    record, finite = quantised(tokens)
    return torch.where(finite, decode_int8(record, *tokens.shape), tokens).view(feature.shape)


def encode_int8(values: Tensor) -> Tensor:
    """The record, uint8 [bytes], of a feature's values, bfloat16 [tokens, C]. Raises SettingsError unless finite."""
    record, finite = quantised(values)
    if not finite:
        raise SettingsError(
            "a feature with values that are not finite cannot be kept in int8: do not store it"
        )
    return record


def quantised(values: Tensor) -> tuple[Tensor, Tensor]:
    """The record of a feature's values, bfloat16 [tokens, C], and whether all are finite (bool []); else it is rubbish.

    Both are on the device of the values, and nothing waits for it. The same bits on every device: each step is one
    that IEEE 754 defines, or a sum that is exact in any order.
    """
    wide = values.float()
    sizes = wide.abs()
    largest = sizes.amax(0)
    normalisers = _positive(torch.minimum(largest, _most(sizes, largest)).to(torch.bfloat16))
    wide /= normalisers.float()
    scales = torch.abs(wide, out=sizes).amax(1)
    # Divided by a tensor: by a number, a GPU multiplies with the reciprocal, whose last bit may differ.
    scales = _positive(scales / torch.full_like(scales, _LEVELS))
    levels = wide.div_(scales[:, None]).round_().clamp_(-_LEVELS, _LEVELS).to(torch.int8)
    record = torch.cat([part.view(-1).view(torch.uint8) for part in (normalisers, scales, levels)])
    return record, largest.isfinite().all()


def _most(sizes: Tensor, largest: Tensor) -> Tensor:
    """What a channel's normaliser may be at most, float32 [C]: so many times the mean of its `sizes` [tokens, C].

    The sizes are rounded down to a multiple of a power of two that is 2^-20 or less of the largest one. So the sum is
    one of whole numbers, below 2^53 for up to 2^32 tokens: exact, in whatever order a device adds them.
    """
    power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32)
    unit = power.clamp_(min=_LEAST_POWER) * _UNIT_OF_POWER
    total = (sizes / unit).trunc_().sum(0, dtype=torch.float64)
    return (total * unit / torch.full_like(total, len(sizes)) * _PEAK_OVER_MEAN).float()


def decode_int8(record: Tensor, tokens: int, channels: int) -> Tensor:
    """bfloat16 [tokens, C] from a record, uint8 [bytes], on the record's device."""
    normalisers, scales, levels = _parts(record, tokens, channels)
    return levels.float().mul_(scales).mul_(normalisers).to(torch.bfloat16)


def decode_rows(record: Tensor, values: Tensor) -> None:
    """The same on a CPU, into `values`, bfloat16 [tokens, C]."""
    normalisers, scales, levels = _parts(record, *values.shape)
    wide = torch.empty_like(values[:_ROWS], dtype=torch.float32)
    pieces = (torch.split(whole, _ROWS) for whole in (values, levels, scales))
    for rows, level, scale in zip(*pieces, strict=True):
        # Mixed dtypes in one product would be converted value by value.
        rows.copy_(wide[: len(rows)].copy_(level).mul_(scale).mul_(normalisers))


def bytes_of(data: memoryview) -> Tensor:
    """uint8 [bytes] over the same memory; of a copy where it may not be written to, which torch does not know."""
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)


def values_of(feature: memoryview, tokens: int, channels: int) -> Tensor:
    """bfloat16 [tokens, C] over the same memory, if it may be written to."""
    return bytes_of(feature).view(torch.bfloat16).view(tokens, channels)


def _parts(record: Tensor, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Normalisers, float32 [C]; scales, float32 [tokens, 1]; levels, int8 [tokens, C]."""
    sizes = [NORMALISER_BYTES * channels, SCALE_BYTES * tokens, tokens * channels]
    normalisers, scales, levels = torch.split(record, sizes)
    normalisers, levels = normalisers.view(torch.bfloat16).float(), levels.view(torch.int8)
    return normalisers, scales.view(torch.float32)[:, None], levels.view(tokens, channels)


def _positive(sizes: Tensor) -> Tensor:
    """Where a channel or a token is all zeros, any number serves."""
    return torch.where(sizes > 0, sizes, torch.ones_like(sizes))

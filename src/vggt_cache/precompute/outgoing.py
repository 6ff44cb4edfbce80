"""Features on their way from the device to the disk: checked, in the form of storage, and copied to the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vggt_cache.codec import INT8
from vggt_cache.codec.quantise import quantised
from vggt_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """A batch that lies where it was computed; nothing of it needs to be complete there yet."""

    keys: Sequence[bytes]
    labels: Sequence[str]
    grid: tuple[int, int]
    dtype: torch.dtype
    """Of the features, also where they are packed already."""
    stored: torch.Tensor
    """[n, h, w, C] in the dtype of storage; of int8 the records, uint8 [n, bytes]"""
    finite: torch.Tensor
    """bool [n]: whether all of a feature's values are"""
    ready: torch.cuda.Event | None
    """The moment from which both are complete on the device; None on a CPU"""


def outgoing(
    keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor, feature_dtype: str
) -> Outgoing:
    """Of features [n, h, w, C] in the dtype of storage (of int8: bfloat16), on any device.

    To be called where they are computed: what is done to them is queued behind that, and nothing waits for it.
    """
    if feature_dtype == INT8:
        stored, finite = _packed(features)
    else:
        stored, finite = features, all_finite(features)
    ready = None
    if features.device.type == "cuda":
        # The stream of the features' own device: the current device may be another one.
        ready = torch.cuda.current_stream(features.device).record_event()
    return Outgoing(
        keys=keys,
        labels=labels,
        grid=(features.shape[1], features.shape[2]),
        dtype=features.dtype,
        stored=stored,
        finite=finite,
        ready=ready,
    )


def all_finite(features: torch.Tensor) -> torch.Tensor:
    """bool [n] on the features' device: whether no value of a feature is NaN or infinite.

    The least and the largest value tell: both are NaN where any is. That reads every value once and keeps nothing,
    a fraction of what `isfinite` of all of them costs. A sum would not do: of float16 it overflows by itself.
    """
    ends = torch.stack([torch.stack(feature.aminmax()) for feature in features])
    return ends.isfinite().all(dim=1)


def _packed(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 records, and whether what they were made from is finite: half of the bytes travel."""
    if features.dtype != torch.bfloat16:
        raise SettingsError(f"features of {features.dtype} are not packed in int8: give torch.bfloat16")
    records = [
        quantised(feature.flatten(0, 1)) for feature in features
    ]  # one at a time: float32 copies are large
    return torch.stack([record for record, _ in records]), torch.stack([finite for _, finite in records])


class HostCopy:
    """Copies to the host on a stream of its own, beside the encoder's next batch."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned = torch.empty(0)
        self._flags = torch.empty(0, dtype=torch.bool)

    def fetch(self, batch: Outgoing) -> tuple[torch.Tensor, list[bool]]:
        """`stored` and `finite` in host memory, valid until the next call."""
        if batch.ready is None:
            return batch.stored, batch.finite.tolist()
        if self._stream is None:
            self._stream = torch.cuda.Stream(batch.stored.device)  # type: ignore[no-untyped-call]
        self._pinned = _pinned_for(batch.stored, self._pinned)
        self._flags = _pinned_for(batch.finite, self._flags)
        host = self._pinned[: batch.stored.numel()].view(batch.stored.shape)
        flags = self._flags[: batch.finite.numel()]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(batch.ready)
            host.copy_(batch.stored, non_blocking=True)
            flags.copy_(batch.finite, non_blocking=True)
        self._stream.synchronize()
        return host, flags.tolist()


def _pinned_for(tensor: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Pinned memory for so many values: what there is, or more."""
    if memory.dtype == tensor.dtype and memory.numel() >= tensor.numel():
        return memory
    return torch.empty(tensor.numel(), dtype=tensor.dtype, pin_memory=True)

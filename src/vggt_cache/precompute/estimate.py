"""What a run would cost, before it is begun: disk, time, and when it has paid for itself."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vggt_cache.codec import INT8, LOSSLESS, NONE, codec_for, shard_codec
from vggt_cache.errors import DiskSpaceError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.decode import DecodedFrame, decode_file
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.report import bytes_text, seconds_text
from vggt_cache.store.record import payload_bytes

_SAMPLED_FRAMES = 8
_MEASURED_LISTS = 16
_OVERHEAD = 1.01
"""Shard headers and padding."""


@dataclass(frozen=True, kw_only=True)
class DiskNeed:
    """Bytes that the pending features take, and bytes that the disk has."""

    feature_bytes: float
    total_bytes: float
    free_bytes: int
    remark: str = ""
    """What else is to be said of the size of a feature."""

    def check(self, cache_dir: str) -> None:
        """Raises DiskSpaceError if it does not fit."""
        if self.total_bytes > self.free_bytes:
            raise DiskSpaceError(
                f"the features need {bytes_text(self.total_bytes)}, but {cache_dir} has {bytes_text(self.free_bytes)} "
                f"free: make room for {bytes_text(self.total_bytes - self.free_bytes)}, choose another --cache_dir or "
                "a smaller --image_size, or start anyway with --force"
            )


def disk_need(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int], cache_dir: str, codec: str = NONE
) -> DiskNeed:
    """Estimated from the grids of a few frames spread over the pending features.

    What `lossless` saves depends on the values, so its features are counted as if they were not packed.
    """
    frames = sample_frames(plan, spec, pending)
    name = shard_codec(spec.feature_dtype, codec)
    sizes = [_bytes_on_disk(spec, *frame.grid, name) for frame in frames]
    feature_bytes = float(np.mean(sizes)) if sizes else 0.0
    return DiskNeed(
        feature_bytes=feature_bytes,
        total_bytes=feature_bytes * len(pending) * _OVERHEAD,
        free_bytes=free_bytes(cache_dir),
        remark=" at most (codec lossless)" if name == LOSSLESS else "",
    )


def _bytes_on_disk(spec: FeatureSpec, h: int, w: int, codec: str) -> int:
    packed = codec_for(codec) if codec == INT8 else None
    if packed is not None:
        return packed.size_limits(h * w, spec.encoder.channels)[1]
    return payload_bytes(spec, h, w)


def sample_frames(plan: Plan, spec: FeatureSpec, pending: Sequence[int]) -> list[DecodedFrame]:
    """Some of the pending features' frames, decoded; unreadable ones are left out."""
    spread = sorted({pending[len(pending) * part // _SAMPLED_FRAMES] for part in range(_SAMPLED_FRAMES)})
    decoded = (decode_file(plan.paths_of(feature)[-1], spec.preprocessing) for feature in spread)
    return [frame for frame in decoded if not frame.error]


def free_bytes(directory: str) -> int:
    """Free bytes for this user on the file system that holds, or will hold, `directory`."""
    at = os.path.abspath(directory)
    while not os.path.exists(at):
        at = os.path.dirname(at)
    return shutil.disk_usage(at).free


@dataclass(frozen=True, kw_only=True)
class TimeNeed:
    """Seconds, extrapolated from a short measurement in this process."""

    precompute_s: float
    live_epoch_s: float
    """What the encoder costs in one epoch of training without a cache."""
    measured_passes: int

    @property
    def first_paying_epoch(self) -> int:
        """The epoch by whose end precomputing has cost less than encoding live."""
        return max(1, math.ceil(self.precompute_s / self.live_epoch_s)) if self.live_epoch_s else 1

    def sentence(self) -> str:
        return (
            f"Precomputing takes about {seconds_text(self.precompute_s)} with one such process; without a cache the "
            f"encoder takes about {seconds_text(self.live_epoch_s)} of every epoch: the cache pays for itself from "
            f"epoch {self.first_paying_epoch} on (extrapolated from {self.measured_passes} frame passes)"
        )


def time_need(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int], encoder: BatchEncoder
) -> TimeNeed | None:
    """Encode a few pending features twice (the first time warms up) and extrapolate; None if none can be read."""
    features, pixels = _measurable(plan, spec, pending)
    if not features:
        return None
    lists = [plan.frames_of(feature).tolist() for feature in features]

    def seconds(encoded: list[list[int]]) -> float:
        return _seconds(lambda: list(spec.context_rule.encode(encoder, encoded, pixels)), encoder)

    _, measured = plan.passes(np.asarray(features))
    _, passes = plan.passes(np.asarray(pending))
    longest = max(lists, key=len)
    shared_s, alone_s = seconds(lists), seconds([longest])
    return TimeNeed(
        precompute_s=shared_s / measured * passes,
        live_epoch_s=alone_s / len(longest) * plan.passes_per_epoch,
        measured_passes=measured,
    )


def _measurable(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int]
) -> tuple[list[int], dict[int, np.ndarray]]:
    """Neighbours from the middle of the pending features, all of whose frames have the grid of the first; pixels."""
    middle = max(0, len(pending) // 2 - _MEASURED_LISTS)
    lists = {
        feature: plan.frames_of(feature).tolist() for feature in pending[middle : middle + _MEASURED_LISTS]
    }
    used = dict.fromkeys(frame for frames in lists.values() for frame in frames)
    decoded = {frame: decode_file(plan.frames.paths[frame], spec.preprocessing) for frame in used}
    good = {frame: one for frame, one in decoded.items() if not one.error}
    grid = next((one.grid for one in good.values()), None)
    pixels = {frame: one.pixels for frame, one in good.items() if one.grid == grid}
    return [feature for feature, frames in lists.items() if all(frame in pixels for frame in frames)], pixels


def _seconds(work: Callable[[], object], encoder: BatchEncoder) -> float:
    work()
    _synchronize(encoder)
    began_s = time.perf_counter()
    work()
    _synchronize(encoder)
    return time.perf_counter() - began_s


def _synchronize(encoder: BatchEncoder) -> None:
    if encoder.encoder.device.type == "cuda":
        torch.cuda.synchronize(encoder.encoder.device)

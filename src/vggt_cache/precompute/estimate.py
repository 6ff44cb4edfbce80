"""What a run would cost, before it is begun: disk, time, and when it has paid for itself."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Sequence

import numpy as np
import torch

from vggt_cache.codec import INT8, ITEM_BYTES, LOSSLESS, codec_for, shard_codec
from vggt_cache.errors import DiskSpaceError
from vggt_cache.identity import FeatureSpec, fits
from vggt_cache.precompute.decode import decode_file
from vggt_cache.precompute.encode import BatchEncoder, Pixels
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.report import Reporter, bytes_text, count_of, seconds_text
from vggt_cache.precompute.settings import PrecomputeSettings

_SAMPLED_FRAMES = 8
_MEASURED_LISTS = 16
_OVERHEAD = 1.01
"""Shard headers and padding."""


def check_disk(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int], settings: PrecomputeSettings, reporter: Reporter
) -> None:
    """Whether the pending features fit on the disk, judged by the grids of a few frames spread over them.

    A dry run is told the figures. What `lossless` saves depends on the values, so its features are counted as if they
    were not packed. Raises DiskSpaceError, but not with --force.
    """
    spread = sorted({pending[len(pending) * part // _SAMPLED_FRAMES] for part in range(_SAMPLED_FRAMES)})
    decoded = (
        (decode_file(plan.paths_of(one)[-1], spec.preprocessing), len(plan.frames_of(one))) for one in spread
    )
    codec = shard_codec(spec.feature_dtype, settings.codec)
    packed = codec_for(codec) if codec == INT8 else None

    def stored_bytes(shape: tuple[int, ...]) -> int:
        plain = math.prod(shape) * ITEM_BYTES[spec.feature_dtype]
        return packed.size_limits(math.prod(shape[:-1]), shape[-1])[1] if packed else plain

    fit = [
        (frame.grid, frames) for frame, frames in decoded if not frame.error and fits(spec.pool, frame.grid)
    ]
    sizes = [stored_bytes(spec.shape(grid, frames)) for grid, frames in fit]
    feature = float(np.mean(sizes)) if sizes else 0.0
    total, free = feature * len(pending) * _OVERHEAD, free_bytes(settings.cache_dir)
    if settings.dry_run:
        remark = " at most (codec lossless)" if codec == LOSSLESS else ""
        reporter.info(
            f"Disk: {bytes_text(total)} for {count_of(len(pending), settings.noun)} of {bytes_text(feature)}{remark}; "
            f"{bytes_text(free)} free"
        )
    if total > free and not settings.force:
        raise DiskSpaceError(
            f"the features need {bytes_text(total)}, but {settings.cache_dir} has {bytes_text(free)} free: make room "
            f"for {bytes_text(total - free)}, choose another --cache_dir or a smaller --image_size, or start anyway "
            "with --force"
        )


def free_bytes(directory: str) -> int:
    """Free bytes for this user on the file system that holds, or will hold, `directory`."""
    at = os.path.abspath(directory)
    while not os.path.exists(at):
        at = os.path.dirname(at)
    return shutil.disk_usage(at).free


def time_estimate(plan: Plan, spec: FeatureSpec, pending: Sequence[int], encoder: BatchEncoder) -> str:
    """A sentence, extrapolated from a few pending features that are encoded twice: the first time warms up."""
    features, pixels = _measurable(plan, spec, pending)
    if not features:
        return "No time estimate: none of the sampled images can be read"

    def seconds(lists: list[list[int]]) -> float:
        for _ in range(2):
            began_s = time.perf_counter()
            list(spec.context_rule.encode(encoder, lists, pixels))
            if encoder.device.type == "cuda":
                torch.cuda.synchronize(encoder.device)
        return time.perf_counter() - began_s

    lists = [plan.frames_of(feature).tolist() for feature in features]
    longest = max(lists, key=len)
    shared_s, alone_s = seconds(lists), seconds([longest])
    (_, measured), (_, passes) = plan.passes(features), plan.passes(pending)
    return time_sentence(
        precompute_s=shared_s / measured * passes,
        live_epoch_s=alone_s / len(longest) * plan.passes_per_epoch,
        measured_passes=measured,
    )


def time_sentence(*, precompute_s: float, live_epoch_s: float, measured_passes: int) -> str:
    """`live_epoch_s`: what the encoder costs in one epoch of training without a cache.

    The cache pays from the epoch on by whose end precomputing has cost less than encoding live.
    """
    epoch = max(1, math.ceil(precompute_s / live_epoch_s)) if live_epoch_s else 1
    return (
        f"Precomputing takes about {seconds_text(precompute_s)} with one such process; without a cache the "
        f"encoder takes about {seconds_text(live_epoch_s)} of every epoch: the cache pays for itself from "
        f"epoch {epoch} on (extrapolated from {measured_passes} frame passes)"
    )


def _measurable(plan: Plan, spec: FeatureSpec, pending: Sequence[int]) -> tuple[list[int], dict[int, Pixels]]:
    """Neighbours from the middle of the pending features, all of whose frames have the grid of the first; pixels."""
    middle = max(0, len(pending) // 2 - _MEASURED_LISTS)
    lists = {
        feature: plan.frames_of(feature).tolist() for feature in pending[middle : middle + _MEASURED_LISTS]
    }
    used = dict.fromkeys(frame for frames in lists.values() for frame in frames)
    decoded = {frame: decode_file(plan.frames.paths[frame], spec.preprocessing) for frame in used}
    good = {frame: one for frame, one in decoded.items() if not one.error}
    grid = next((one.grid for one in good.values()), None)
    pixels = {
        frame: one.pixels for frame, one in good.items() if one.grid == grid and fits(spec.pool, one.grid)
    }
    return [feature for feature, frames in lists.items() if all(frame in pixels for frame in frames)], pixels

"""What a run would cost, before it is begun: disk, time, and when it has paid for itself."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from vggt_cache.codec import INT8, ITEM_BYTES, LOSSLESS, codec_for, shard_codec
from vggt_cache.errors import DiskSpaceError
from vggt_cache.identity import PATCH_SIZE, FeatureSpec, fits
from vggt_cache.output import name_text
from vggt_cache.pixels import Pixels
from vggt_cache.place import absolute, is_url
from vggt_cache.precompute.decode import DecodedFrame, read_digest
from vggt_cache.precompute.encode import of_one_dtype
from vggt_cache.precompute.engine import Engine
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.report import Reporter, bytes_text, count_of, seconds_text
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.samples.paths import parts_of

_SAMPLED_FRAMES = 8
_MEASURED_LISTS = 16
_READING_THREADS = 8
_OVERHEAD = 1.01
"""Shard headers and padding."""


def without_absent(plan: Plan, pending: Sequence[int]) -> tuple[list[int], list[int]]:
    """The frames of pending features that have no file, and those of the features that are not without one."""
    absent = {frame for frame, path in enumerate(plan.frames.paths) if not plan.frames.state(frame)}
    absent = {frame for frame in absent if not os.path.exists(plan.frames.paths[frame])}
    if not absent:
        return [], list(pending)
    lacking = {feature: absent.intersection(plan.frames_of(feature).tolist()) for feature in pending}
    frames = sorted(set().union(*lacking.values()))
    return frames, [feature for feature, gone in lacking.items() if not gone]


def absent_sentence(plan: Plan, absent: Sequence[int], features: int, noun: str) -> str:
    """How many images there are not, where, and what that costs."""
    paths = [plan.frames.paths[frame] for frame in absent]
    are = "image does" if len(paths) == 1 else "images do"
    folder = name_text(os.path.commonpath(map(os.path.dirname, paths)))
    below = f", all below {folder}" if len(paths) > 1 else ""
    return (
        f"{len(paths)} {are} not exist: the first is {name_text(paths[0])}{below}; {count_of(features, noun)} cannot "
        "be computed and the estimates leave them out: check --data_root, and whether all of the data was copied"
    )


def hash_unknown(known: KnownKeys, pending: Sequence[int], reporter: Reporter, *, keep: bool) -> None:
    """Read those images of pending features whose bytes are not known, so that features they have already are found.

    `keep`: write the digests down, so that no later run does it again. Takes as long as reading the images.
    """
    frames = known.unknown_frames(pending)
    if not frames:
        return
    reporter.info(
        f"Reading {count_of(len(frames), 'image')} that are new or were touched, to see what is stored already"
    )
    with ThreadPoolExecutor(_READING_THREADS) as pool, reporter.bar(len(frames), "image") as bar:
        for part in parts_of(frames, 64):
            seen = list(pool.map(read_digest, (known.plan.frames.paths[frame] for frame in part)))
            for frame, (digest, _) in zip(part, seen, strict=True):
                if isinstance(digest, bytes):
                    known.learn(frame, digest)
            if keep:
                known.table.append(
                    (state, digest) for digest, state in seen if state and isinstance(digest, bytes)
                )
            bar.update(len(part))


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that features will take on the disk, judged by the grids of a few frames spread over them."""

    plan: Plan
    spec: FeatureSpec
    settings: PrecomputeSettings
    reporter: Reporter
    _sizes: dict[int, int] = field(default_factory=dict)
    """Of features that were looked at; 0 where the frame cannot be used."""

    def feature_bytes(self, pending: Sequence[int]) -> float:
        """Of one feature on average; what `lossless` saves depends on the values and is not counted."""
        spread = {pending[len(pending) * part // _SAMPLED_FRAMES] for part in range(_SAMPLED_FRAMES)}
        sizes = [size for feature in sorted(spread) if (size := self._size_of(feature))]
        return float(np.mean(sizes)) if sizes else 0.0

    def total_bytes(self, pending: Sequence[int]) -> float:
        """Of all of them, with headers and padding."""
        return self.feature_bytes(pending) * len(pending) * _OVERHEAD if pending else 0.0

    def fits(self, pending: Sequence[int]) -> bool:
        return self.settings.force or self.total_bytes(pending) <= free_bytes(self.settings.cache_dir)

    def check(self, pending: Sequence[int]) -> None:
        """A dry run is told the figures. Raises DiskSpaceError where they do not fit, but not with --force."""
        settings, feature = self.settings, self.feature_bytes(pending)
        total, free = self.total_bytes(pending), free_bytes(settings.cache_dir)
        if settings.dry_run:
            packed = shard_codec(self.spec.feature_dtype, settings.codec) == LOSSLESS
            self.reporter.info(
                f"Disk: {bytes_text(total)} for {count_of(len(pending), settings.noun)} of {bytes_text(feature)}"
                f"{' at most (codec lossless)' if packed else ''}; "
                f"{'a bucket has no limit' if free == UNLIMITED else f'{bytes_text(free)} free'}"
            )
        if total > free and not settings.force:
            raise DiskSpaceError(
                f"the features need {bytes_text(total)}, but {settings.cache_dir} has {bytes_text(free)} free: make "
                f"room for {bytes_text(total - free)}, choose another --cache_dir or a smaller --image_size, or start "
                "anyway with --force"
            )

    def _size_of(self, feature: int) -> int:
        if feature not in self._sizes:
            frames = self.plan.frames_of(feature)
            frame = _decoded(self.plan, int(frames[-1]), self.spec, self.reporter)
            usable = not frame.error and fits(self.spec.pool, frame.grid)
            self._sizes[feature] = (
                self.stored_bytes(self.spec.shape(frame.grid, len(frames))) if usable else 0
            )
        return self._sizes[feature]

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        codec = shard_codec(self.spec.feature_dtype, self.settings.codec)
        if codec == INT8:
            return codec_for(codec).size_limits(math.prod(shape[:-1]), shape[-1])[1]
        return math.prod(shape) * ITEM_BYTES[self.spec.feature_dtype]


UNLIMITED = math.inf


def free_bytes(directory: str) -> float:
    """Free bytes for this user on the file system that holds, or will hold, `directory`; a bucket has no limit."""
    at = absolute(directory)
    if is_url(at):
        return UNLIMITED
    while not os.path.exists(at):
        at = os.path.dirname(at)
    return shutil.disk_usage(at).free


def time_estimate(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int], engine: Engine, reporter: Reporter
) -> str:
    """A sentence, extrapolated from a few pending features that are encoded twice: the first time warms up."""
    features, pixels = _measurable(plan, spec, pending, _MEASURED_LISTS, reporter)
    if not features:
        return "No time estimate: none of the sampled images can be read"
    lists = [plan.frames_of(feature).tolist() for feature in features]
    longest = max(lists, key=len)
    shared_s, alone_s = (engine.seconds(some, pixels) for some in (lists, [longest]))
    (_, measured), (_, passes) = plan.passes(features), plan.passes(pending)
    return time_sentence(
        precompute_s=shared_s / measured * passes,
        live_epoch_s=alone_s / len(longest) * plan.passes_per_epoch,
        measured_passes=measured,
    )


def break_even(need: DiskNeed, pending: Sequence[int], engine: Engine) -> str:
    """A sentence: the read speed below which a cache is slower than no cache, from one pending feature, encoded alone.

    Alone, with all frames of its list, is how training without a cache computes it.
    """
    plan, spec = need.plan, need.spec
    features, pixels = _measurable(plan, spec, pending, 1, need.reporter)
    if not features:
        return "Whether reading is faster than computing is not known: the sampled images cannot be used"
    frames = plan.frames_of(features[0]).tolist()
    seconds = engine.seconds([frames], pixels)
    height, width, _ = pixels[frames[-1]].shape
    size = need.stored_bytes(spec.shape((height // PATCH_SIZE, width // PATCH_SIZE), len(frames)))
    total = need.total_bytes(pending)
    return pays_sentence(size, total, count_of(len(pending), need.settings.noun), seconds, engine.device_name)


def pays_sentence(size: int, total: float, features: str, seconds: float, device: str) -> str:
    """`size` in bytes is what a sample reads, and what the encoder takes `seconds` for."""
    verb = "is" if features.startswith("1 ") else "are"
    return (
        f"A sample reads {megabytes(size)}, {features} {verb} {bytes_text(total)}, and the encoder takes "
        f"{1000 * seconds:.1f} ms for a sample on {device}: the cache pays where each such device reads more than "
        f"{megabytes(size / max(seconds, 1e-9))}/s from it; below that, reading is slower than computing"
    )


def megabytes(count: float) -> str:
    """In units of 10**6, as the speed of disks is told: three digits."""
    return f"{count / 1e6:.{2 if count < 1e7 else 1 if count < 1e8 else 0}f} MB"


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


def _measurable(
    plan: Plan, spec: FeatureSpec, pending: Sequence[int], most: int, reporter: Reporter
) -> tuple[list[int], Mapping[int, Pixels]]:
    """Neighbours from the middle of the pending features, all of whose frames have the grid of the first; pixels."""
    middle = max(0, len(pending) // 2 - most)
    lists = {feature: plan.frames_of(feature).tolist() for feature in pending[middle : middle + most]}
    used = dict.fromkeys(frame for frames in lists.values() for frame in frames)
    decoded = {frame: _decoded(plan, frame, spec, reporter) for frame in used}
    good = {frame: one for frame, one in decoded.items() if not one.error}
    grid = next((one.grid for one in good.values()), None)
    pixels = of_one_dtype(
        {frame: one.pixels for frame, one in good.items() if one.grid == grid and fits(spec.pool, one.grid)}
    )
    return [feature for feature, frames in lists.items() if all(frame in pixels for frame in frames)], pixels


def _decoded(plan: Plan, frame: int, spec: FeatureSpec, reporter: Reporter) -> DecodedFrame:
    """What a run would warn of is said before it is begun."""
    decoded = plan.frames.decode(frame, spec.preprocessing)
    if decoded.remark:
        reporter.remark(plan.frames.paths[frame], decoded.remark)
    return decoded

"""Is every feature that the data needs present and intact?

Verification trusts nothing that was written down about the data: it reads the bytes of every image anew,
forms the keys from them, and checks every record against its checksum. The digests that it sees are written down, so
that precompute, run again, knows what is missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from vggt_cache.encoder import Encoder
from vggt_cache.errors import CorruptRecordError, FrameError, StoreError
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.precompute.decode import decode_file, reason_without_path
from vggt_cache.precompute.digests import DigestTable, read_in_state
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.plan import Plan
from vggt_cache.samples.paths import parts_of
from vggt_cache.store import FeatureCache

LARGEST_RELATIVE_ERROR = 0.05
"""bfloat16 arithmetic on another device moves a feature by about 0.01; a wrong feature is off by about 1."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How many of the wanted features are present and intact."""

    wanted: int
    invalid: int

    @property
    def valid(self) -> int:
        return self.wanted - self.invalid

    def __str__(self) -> str:
        return f"Verification: {self.valid}/{self.wanted} valid, {self.invalid} invalid"


def verify_data(
    cache: FeatureCache,
    plan: Plan,
    *,
    threads: int = 8,
    on_invalid: Callable[[str, str], None],
    on_progress: Callable[[int], object],
) -> Verification:
    """Check all features that `plan` wants. `on_invalid(label, reason)` is told of each that is not as it should be.

    A cache that cannot be written to is verified all the same.
    """
    table = DigestTable(cache.cache_dir)
    digests: dict[int, bytes | str] = {}
    invalid = 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for block in plan.blocks:
            features = block.features.tolist()
            lists = [plan.frames_of(feature).tolist() for feature in features]
            unread = list(
                dict.fromkeys(frame for frames in lists for frame in frames if frame not in digests)
            )
            seen = list(pool.map(_digest_or_reason, (plan.frames.paths[f] for f in unread)))
            digests.update((frame, digest) for frame, (digest, _) in zip(unread, seen, strict=True))
            table.correct({state: digest for digest, state in seen if state and isinstance(digest, bytes)})
            reasons = pool.map(lambda frames: _complaint(cache, [digests[frame] for frame in frames]), lists)
            for feature, reason in zip(features, reasons, strict=True):
                if reason:
                    invalid += 1
                    on_invalid(plan.label(feature), reason)
            on_progress(len(features))
    return Verification(wanted=len(plan), invalid=invalid)


def verify_records(
    cache: FeatureCache,
    *,
    threads: int = 8,
    on_invalid: Callable[[str, str], None],
    on_progress: Callable[[int], object],
) -> Verification:
    """Check every record of a store against its checksum, whatever data it belongs to."""
    wanted = invalid = 0
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for keys in parts_of(cache.keys(), 256):
            for key, reason in zip(
                keys, pool.map(lambda key: _record_complaint(cache, key), keys), strict=True
            ):
                if reason:
                    invalid += 1
                    on_invalid(key.hex(), reason)
            wanted += len(keys)
            on_progress(len(keys))
    for name, reason in cache.damaged_shards:
        on_invalid(name, reason)
        invalid, wanted = invalid + 1, wanted + 1
    return Verification(wanted=wanted, invalid=invalid)


def largest_relative_error(
    cache: FeatureCache, plan: Plan, encoder: Encoder, count: int
) -> tuple[int, float, str]:
    """Compute `count` random features again, each alone, and compare with what is stored.

    Returns how many were compared, the largest relative L2 error, and the label of that feature. Features
    that are absent or unreadable are left to `verify_data`.
    """
    chosen = random.SystemRandom().sample(range(len(plan)), min(count, len(plan)))
    batches = BatchEncoder(encoder, 1, on_halved=lambda size: None)
    compared, worst, label = 0, 0.0, ""
    for feature in chosen:
        decoded = [decode_file(path, cache.spec.preprocessing) for path in plan.paths_of(feature)]
        if any(frame.error for frame in decoded):
            continue
        stored = _stored_or_none(cache, feature_key(cache.spec, [frame.digest for frame in decoded]))
        if stored is None:
            continue
        pixels = {position: frame.pixels for position, frame in enumerate(decoded)}
        ((_, fresh),) = cache.spec.context_rule.encode(batches, [list(pixels)], pixels)
        error = relative_error(stored, fresh[0])
        compared += 1
        if error >= worst:
            worst, label = error, plan.label(feature)
    return compared, worst, label


def relative_error(stored: torch.Tensor, fresh: torch.Tensor) -> float:
    """Relative L2 distance of two features, in float64."""
    reference = fresh.double().cpu()
    return float((stored.double().cpu() - reference).norm() / reference.norm().clamp(min=1e-30))


def _digest_or_reason(path: str) -> tuple[bytes | str, bytes]:
    """The digest of a file, with the hash of its state, see `read_in_state`; or why it cannot be read."""
    try:
        data, state = read_in_state(path)
        return frame_digest(data), state
    except FrameError as error:
        return reason_without_path(error, path), b""


def _complaint(cache: FeatureCache, digests: Sequence[bytes | str]) -> str:
    usable = [digest for digest in digests if isinstance(digest, bytes)]
    if len(usable) < len(digests):
        return next(digest for digest in digests if isinstance(digest, str))
    return _record_complaint(cache, feature_key(cache.spec, usable))


def _record_complaint(cache: FeatureCache, key: bytes) -> str:
    try:
        return "" if cache.verify_record(key) else "missing"
    except StoreError as error:
        return str(error)


def _stored_or_none(cache: FeatureCache, key: bytes) -> torch.Tensor | None:
    try:
        return cache.get_by_key(key)
    except CorruptRecordError:
        return None

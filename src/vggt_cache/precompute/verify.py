"""Is every feature that the data needs present and intact?

Verification trusts nothing that was written down about the data: it reads the bytes of every image anew, forms the keys
from them, and checks every record against its checksum. The digests that it sees are written down, so that precompute,
run again, knows what is missing.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from vggt_cache.errors import CorruptRecordError, OutOfMemoryError, StoreError
from vggt_cache.identity import feature_key
from vggt_cache.output import name_text
from vggt_cache.precompute.decode import read_digest
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.engine import Engine
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.report import Reporter, count_of
from vggt_cache.samples.paths import parts_of
from vggt_cache.store import FeatureCache

LARGEST_RELATIVE_ERROR = 0.05
"""bfloat16 arithmetic on another device moves a feature by about 0.01; a wrong feature is off by about 1."""
Verdict = tuple[str, str]
"""What was checked, and what is wrong with it. Of what is present and intact both are empty."""


def verify_data(cache: FeatureCache, plan: Plan, *, threads: int = 8) -> Iterator[Verdict]:
    """Check all features that `plan` wants. A cache that cannot be written to is verified all the same."""
    table = DigestTable(cache.cache_dir)
    digests: dict[int, bytes | str] = {}
    with ThreadPoolExecutor(threads) as pool:
        for features in parts_of(range(len(plan)), 64):
            lists = [plan.frames_of(feature).tolist() for feature in features]
            unread = list(dict.fromkeys(f for frames in lists for f in frames if f not in digests))
            seen = list(pool.map(read_digest, (plan.frames.paths[f] for f in unread)))
            digests.update((frame, digest) for frame, (digest, _) in zip(unread, seen, strict=True))
            table.correct({state: digest for digest, state in seen if state and isinstance(digest, bytes)})
            reasons = pool.map(lambda frames: _complaint(cache, [digests[frame] for frame in frames]), lists)
            for feature, reason in zip(features, reasons, strict=True):
                yield plan.label(feature) if reason else "", reason


def verify_records(cache: FeatureCache, *, threads: int = 8) -> Iterator[Verdict]:
    """Check every record of a store against its checksum, whatever data it belongs to."""
    with ThreadPoolExecutor(threads) as pool:
        for keys in parts_of(cache.keys(), 256):
            reasons = pool.map(lambda key: _record_complaint(cache, key), keys)
            yield from (
                (key.hex() if reason else "", reason) for key, reason in zip(keys, reasons, strict=True)
            )
    yield from cache.damaged_shards


def tell_verdicts(verdicts: Iterable[Verdict], total: int, reporter: Reporter, noun: str = "feature") -> int:
    """Say what is not as it should be, with a progress bar of `total`, and the result. Returns how many are invalid."""
    wanted = invalid = 0
    with tqdm(total=total, desc="Verifying", unit=noun, mininterval=1.0) as bar:
        for label, reason in verdicts:
            wanted += 1
            bar.update()
            if reason:
                invalid += 1
                reporter.warn_of(
                    invalid, f"invalid: {name_text(label)}: {reason}", "the others are only counted"
                )
    reporter.info(f"Verification: {wanted - invalid}/{wanted} valid, {invalid} invalid")
    return invalid


def recompute_some(cache: FeatureCache, plan: Plan, engine: Engine, count: int, reporter: Reporter) -> bool:
    """Compute `count` random features again, each alone; whether one is not what is stored, but for rounding.

    Tells the largest relative L2 error, in float64. Features that are absent or unreadable are left to `verify_data`.
    """
    compared, worst, label = 0, 0.0, "none stored"
    for feature in random.SystemRandom().sample(range(len(plan)), min(count, len(plan))):
        decoded = [plan.frames.decode(f, cache.spec.preprocessing) for f in plan.frames_of(feature).tolist()]
        if any(frame.error for frame in decoded):
            continue
        try:
            stored = cache.get_by_key(feature_key(cache.spec, [frame.digest for frame in decoded]))
        except CorruptRecordError:
            continue
        if stored is None:
            continue
        pixels = {position: frame.pixels for position, frame in enumerate(decoded)}
        try:
            reference = engine.alone(pixels).double()
        except OutOfMemoryError:
            reporter.warn(
                f"{plan.label(feature)}: it does not fit into memory here, so it is not computed again"
            )
            continue
        error = float((stored.double().cpu() - reference).norm() / reference.norm().clamp(min=1e-30))
        compared += 1
        if error >= worst:
            worst, label = error, plan.label(feature)
    reporter.info(f"Recomputed {count_of(compared, 'feature')}: largest relative error {worst:.2e} ({label})")
    if worst > LARGEST_RELATIVE_ERROR:
        reporter.warn(
            f"a relative error over {LARGEST_RELATIVE_ERROR} is more than rounding: the cache holds wrong "
            "features; do not train from it, and report this"
        )
    return worst > LARGEST_RELATIVE_ERROR


def _complaint(cache: FeatureCache, digests: Sequence[bytes | str]) -> str:
    for reason in digests:
        if isinstance(reason, str):
            return reason
    return _record_complaint(cache, feature_key(cache.spec, [d for d in digests if isinstance(d, bytes)]))


def _record_complaint(cache: FeatureCache, key: bytes) -> str:
    try:
        return "" if cache.verify_record(key) else "missing"
    except StoreError as error:
        return str(error)

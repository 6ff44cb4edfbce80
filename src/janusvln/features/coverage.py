"""How much of a data set is in the cache, from metadata alone: no image is opened."""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.plan import KnownKeys, Plan
from vggt_cache.samples import Sources, iter_samples
from vggt_cache.store import FeatureCache


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Features that a data set needs, as far as the digest table knows its images."""

    total: int
    present: int
    unknown: int
    """An image of theirs has not been read in its present state: precompute has not seen it."""

    @property
    def missing(self) -> int:
        return self.total - self.present - self.unknown

    def sentence(self, noun: str) -> str:
        share = 100 * self.present / self.total if self.total else 100.0
        text = (
            f"Coverage of this data set: {self.present}/{self.total} {noun}s are in the cache ({share:.1f} %)"
        )
        if self.missing:
            text += f", {self.missing} are not"
        if self.unknown:
            text += f", {self.unknown} are not known, as their images are new or changed since precompute"
        return text


def measure_coverage(sources: Sources, cache: FeatureCache) -> Coverage:
    """Read all annotations and the metadata of all images. Takes seconds for 100,000 samples."""
    samples = iter_samples(sources, on_problem=lambda problem: None)
    plan = Plan(samples, sources.root, cache.spec.context)
    known = KnownKeys(plan, cache.spec, DigestTable(cache.cache_dir))
    present = unknown = 0
    for feature in range(len(plan)):
        key = known.key(feature)
        unknown += key is None
        present += key is not None and key in cache
    return Coverage(total=len(plan), present=present, unknown=unknown)

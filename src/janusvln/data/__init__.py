"""From annotations to batches, in DataLoader workers.

    sources_of(flags) ──> SampleIndex ──> NavigationDataset[i] ──> PaddedCollator or PackedCollator ──> batch

A batch carries keys of features, not features: see `janusvln.features`.
"""

from janusvln.data.collate import PackedCollator, PaddedCollator
from janusvln.data.dataset import DataOptions, NavigationDataset, sentence_of, sources_of
from janusvln.data.dialogue import navigation_prompt
from vggt_cache.samples import SampleIndex

__all__ = [
    "DataOptions",
    "NavigationDataset",
    "PackedCollator",
    "PaddedCollator",
    "SampleIndex",
    "navigation_prompt",
    "sentence_of",
    "sources_of",
]

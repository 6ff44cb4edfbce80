"""From annotations to batches, in DataLoader workers.

    sources_of(flags) ──> SampleIndex ──> NavigationDataset[i] ──> PaddedCollator or PackedCollator ──> batch

    turns, conversations, structured     what is said in a sample
    chat, positions                      token ids, labels, weights, position ids
    frames, pixels                       image files to digests, features' keys and Qwen's pixel values

A batch carries keys of features, not features: see `janusvln.features`.
"""

from janusvln.data.collate import PackedCollator, PaddedCollator
from janusvln.data.dataset import NavigationDataset
from janusvln.data.errors import sentence_of
from janusvln.data.options import DataOptions
from janusvln.data.sources import sources_of
from janusvln.data.structured import navigation_prompt
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

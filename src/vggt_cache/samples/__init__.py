"""Training data as users bring it: one reader, shared by precompute and training.

    find_sources(data_root) ──> Sources ──> iter_samples ──> Sample(ordered frame names, record)
    sources_of_files(files)        │                            │
                             SampleIndex[i] ──> Sample   FrameTable ──> paths and states of the image files

Precompute and training see the same ordered frame lists because both read them here. Nothing in this
package opens an image. `docs/data.md` describes the layouts.
"""

from vggt_cache.samples.episodes import history_indexes, read_episode_text
from vggt_cache.samples.frame_table import FrameTable
from vggt_cache.samples.paths import locate_frame
from vggt_cache.samples.reader import SampleIndex, iter_samples
from vggt_cache.samples.sample import Problem, Sample
from vggt_cache.samples.sources import Sources, find_sources, sources_of, sources_of_files
from vggt_cache.small_files import FileState

__all__ = [
    "FileState",
    "FrameTable",
    "Problem",
    "Sample",
    "SampleIndex",
    "Sources",
    "find_sources",
    "history_indexes",
    "iter_samples",
    "locate_frame",
    "read_episode_text",
    "sources_of",
    "sources_of_files",
]

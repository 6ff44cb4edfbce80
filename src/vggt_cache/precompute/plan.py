"""What has to be computed: from the data's samples to features and to blocks of work.

Planning opens annotation files and asks the file system for the metadata of images; it opens no image.
Everything per sample is held in flat arrays, so that millions of samples fit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vggt_cache.context import CONTEXTS
from vggt_cache.errors import DataError
from vggt_cache.identity import Preprocessing
from vggt_cache.precompute.decode import DecodedFrame, DecodePool, decode_file
from vggt_cache.precompute.report import Reporter, count_of
from vggt_cache.samples import FileState, FrameTable, iter_samples, sources_of
from vggt_cache.samples.order import OrderWatch

Indexes = npt.NDArray[np.int64]


LEAST_PER_BLOCK = 8
"""Features. So many at least fill a batch of the default size; trees that share prefixes stay whole, and have more."""
_PARTS_OF_THE_REST = 256
"""A block is at most such a part of what is left of the data: less than a process waits for at the end of a run."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """A piece of work that one process claims. `features` are indexes into the plan, the wanted ones only."""

    block_id: str
    features: Indexes


@dataclass(frozen=True, kw_only=True)
class Task:
    """A block, and all of the plan that is needed to compute it: small, and fit to be sent elsewhere."""

    block_id: str
    features: Sequence[int]
    lists: Sequence[Sequence[int]]
    """Of each feature its frames in order, by their numbers in the plan."""
    labels: Sequence[str]
    paths: Mapping[int, str]
    """Of each frame."""


class FrameSource(Protocol):
    """The frames that samples name, each once, as a FrameTable has them; and how one becomes pixels."""

    @property
    def paths(self) -> Sequence[str]: ...
    def __len__(self) -> int: ...
    def add(self, sample: Any) -> list[int]: ...
    def resolve(self) -> None: ...
    def frame_ids(self) -> array[int]: ...
    def state(self, frame: int) -> FileState | None: ...
    def submit(self, frame: int, decoder: DecodePool) -> Callable[[], DecodedFrame]:
        """What is returned waits for the result."""

    def decode(self, frame: int, preprocessing: Preprocessing) -> DecodedFrame:
        """At once."""


class ImageFiles(FrameTable):
    """Frames that are files."""

    def submit(self, frame: int, decoder: DecodePool) -> Callable[[], DecodedFrame]:
        return decoder.submit(self.paths[frame])

    def decode(self, frame: int, preprocessing: Preprocessing) -> DecodedFrame:
        return decode_file(self.paths[frame], preprocessing)


class Plan:
    """The features that samples need, in the order of their first appearance. Each belongs to a frame list."""

    def __init__(
        self,
        samples: Iterable[Any],
        root: str,
        context: str,
        max_samples: int = -1,
        frames: FrameSource | None = None,
    ) -> None:
        """Goes through all samples, and the metadata of all images; takes seconds for 100,000 samples.

        `root`: what processes that share the work may have mounted in different places. `frames`: of `samples` that
        name no files.
        """
        self.root = root
        self.context = CONTEXTS[context]
        self.sample_count = self.text_only_count = 0
        self.frames: FrameSource = ImageFiles() if frames is None else frames
        self._max_samples = max_samples
        references, offsets = array("q"), array("q", [0])
        for sample in samples:
            self.sample_count += 1
            if sample.frames:
                references.extend(self.frames.add(sample))
                offsets.append(len(references))
            else:
                self.text_only_count += 1
        self.frames.resolve()
        self.sample_frames = np.asarray(self.frames.frame_ids(), np.int64)[np.asarray(references, np.int64)]
        """The frames of all samples that name any, one sample after the other."""
        self.sample_offsets = np.asarray(offsets, np.int64)
        """Where each of these samples begins in `sample_frames`, and where the last one ends."""
        wanted = self.context.wanted_lists(self.sample_frames, self.sample_offsets)
        self._lists, self._offsets = _distinct_lists(*wanted)
        last = self.sample_frames[self.sample_offsets[1:] - 1]
        is_each_alone = not (self.context.shares_prefixes or self.context.of_all_frames)
        self.history_only = len(self._offsets) - 1 - len(np.unique(last)) if is_each_alone else 0
        """Features of images that are no sample's last one, which no training asks for."""

    def __len__(self) -> int:
        """Number of features wanted: all, or the first `max_samples`."""
        found = len(self._offsets) - 1
        return found if self._max_samples < 0 else min(found, self._max_samples)

    def frames_of(self, feature: int) -> Indexes:
        """The ordered frame ids of one feature."""
        return self._lists[self._offsets[feature] : self._offsets[feature + 1]]

    def paths_of(self, feature: int) -> list[str]:
        return [self.frames.paths[frame] for frame in self.frames_of(feature)]

    def label(self, feature: int) -> str:
        """How a feature is called in messages."""
        return self.context.label(self.paths_of(feature))

    def task_of(self, block: Block) -> Task:
        features = block.features.tolist()
        lists = [self.frames_of(feature).tolist() for feature in features]
        return Task(
            block_id=block.block_id,
            features=features,
            lists=lists,
            labels=[self.label(feature) for feature in features],
            paths={frame: self.frames.paths[frame] for frames in lists for frame in frames},
        )

    @property
    def passes_per_epoch(self) -> int:
        """Frame passes through the encoder that training without a cache makes in one epoch."""
        lengths = Counter(np.diff(self.sample_offsets).tolist())
        return sum(times * len(self.context.used(range(length))) for length, times in lengths.items())

    def passes(self, features: Sequence[int]) -> tuple[int, int]:
        """Frame passes for these features without and with sharing of common prefixes."""
        chosen = np.asarray(features, np.int64)
        starts, lengths = self._offsets[chosen], np.diff(self._offsets)[chosen]
        unshared = int(lengths.sum())
        if not self.context.shares_prefixes:
            return unshared, unshared
        return unshared, _distinct_prefixes(self._lists, starts, lengths)

    @cached_property
    def blocks(self) -> list[Block]:
        """All work. A block's id depends on the data alone, so that processes with other limits agree on it."""
        root = self.root.rstrip("/") + "/"
        names = (path.removeprefix(root).encode("utf-8", "surrogateescape") for path in self.frames.paths)
        hashes = b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in names)
        hash_of = np.frombuffer(hashes, np.dtype("V16"))
        blocks = []
        for features in self._feature_groups():
            hasher = hashlib.blake2b(digest_size=16)
            for feature in features:
                hasher.update(hash_of[self.frames_of(feature)].tobytes() + b"|")
            wanted = features[features < len(self)]
            if len(wanted):
                blocks.append(Block(block_id=hasher.hexdigest(), features=wanted))
        return blocks

    def blocks_of(self, features: Iterable[int]) -> list[Block]:
        """The blocks that hold these features, with no others in them."""
        chosen = np.zeros(len(self), np.bool_)
        chosen[np.fromiter(features, np.int64)] = True
        cut = (replace(block, features=block.features[chosen[block.features]]) for block in self.blocks)
        return [block for block in cut if len(block.features)]

    def which_use(self, frames: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """For each feature whether one of these frames (bool [frames]) is in its list."""
        return np.logical_or.reduceat(frames[self._lists], self._offsets[:-1])[: len(self)]

    def _feature_groups(self) -> Iterator[Indexes]:
        """Whole trees of lists that start with the same frame, since only these share prefixes; neighbours together."""
        _, appeared, tree = np.unique(self._lists[self._offsets[:-1]], return_index=True, return_inverse=True)
        order = np.argsort(appeared[tree], kind="stable")
        trees = np.flatnonzero(np.diff(appeared[tree][order], append=-1)) + 1
        bounds = block_bounds(trees, self.context.features_per_block)
        return (order[begin:end] for begin, end in pairwise(bounds))


def block_bounds(trees: Indexes, most: int) -> list[int]:
    """Where blocks begin, and the last one ends, in features of which whole trees end at `trees`.

    Of `most` features, or to the end of a tree; smaller towards the end of the data, so that whoever is done early
    finds something to share in. That follows from the data alone.
    """
    bounds, total = [0], int(trees[-1]) if len(trees) else 0
    while (at := bounds[-1]) < total:
        share = (total - at) // _PARTS_OF_THE_REST // LEAST_PER_BLOCK * LEAST_PER_BLOCK
        end = at + min(most, max(LEAST_PER_BLOCK, share))
        bounds.append(int(trees[min(int(np.searchsorted(trees, end)), len(trees) - 1)]))
    return bounds


def plan_and_tell(
    data_root: str | None,
    context: str,
    max_samples: int,
    reporter: Reporter,
    *,
    annotation_path: str | None = None,
    data_path: str | None = None,
) -> Plan:
    """Read everything below `data_root`, or the files in `annotation_path`, and tell what was found.

    Raises DataError, also where no frame is named.
    """
    data = data_root or annotation_path
    reporter.info(f"Reading annotations: {data}" if annotation_path else f"Scanning data root: {data}")
    sources = sources_of(data_root, annotation_path, data_path)
    for remark in sources.remarks():
        reporter.info(remark)
    samples = iter_samples(sources, on_problem=lambda bad: reporter.failed(bad.where, bad.reason))
    watch = OrderWatch()
    if CONTEXTS[context].noun == "feature":
        samples = watch.passing(samples)
    plan = Plan(samples, sources.root, context, max_samples)
    reporter.info(f"Found {len(sources.jsonl_files)} JSONL files")
    if sources.json_files:
        reporter.info(f"Found {len(sources.json_files)} JSON files")
    if sources.episode_dirs:
        reporter.info(f"Found {len(sources.episode_dirs)} episode folders")
    reporter.info(f"Total samples: {plan.sample_count}")
    if plan.text_only_count:
        reporter.info(f"{count_of(plan.text_only_count, 'sample')} without frames need no feature")
    if not len(plan):
        raise DataError(
            f"no sample below {data} names a frame, so there is nothing to compute: check --data_root, and the "
            "names of the fields (images, image, history_images and current_image)"
        )
    for sentence in watch.sentences():
        reporter.warn(sentence)
    return plan


def _distinct_lists(frames: Indexes, offsets: Indexes) -> tuple[Indexes, Indexes]:
    """Each different list once, in the order of first appearance."""
    if len(frames) == len(offsets) - 1 and (offsets == np.arange(len(offsets))).all():
        # Lists of one frame each, perhaps of millions of images.
        values, first = np.unique(frames, return_index=True)
        return values[np.argsort(first)], np.arange(len(values) + 1)
    first_of: dict[bytes, int] = {}
    for index in range(len(offsets) - 1):
        content = frames[offsets[index] : offsets[index + 1]].tobytes()
        first_of.setdefault(hashlib.blake2b(content, digest_size=16).digest(), index)
    chosen = np.fromiter(first_of.values(), np.int64)
    lengths = np.diff(offsets)[chosen]
    ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    within = np.arange(ends[-1]) - np.repeat(ends[:-1], lengths)
    return frames[np.repeat(offsets[:-1][chosen], lengths) + within], ends


def _distinct_prefixes(frames: Indexes, starts: Indexes, lengths: Indexes) -> int:
    """Nodes of the prefix tree of all lists: one encoder pass each."""
    node = np.zeros(len(starts), np.int64)
    alive = np.arange(len(starts))
    total = 0
    for depth in range(int(lengths.max(initial=0))):
        alive = alive[lengths[alive] > depth]
        step = np.stack([node[alive], frames[starts[alive] + depth]], axis=1)
        unique, inverse = np.unique(step, axis=0, return_inverse=True)
        node[alive] = inverse.reshape(-1) + total
        total += len(unique)
    return total

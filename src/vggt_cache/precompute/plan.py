"""What has to be computed: from the data's samples to features and to blocks of work.

Planning opens annotation files and asks the file system for the metadata of images; it opens no image.
Everything per sample is held in flat arrays, so that millions of samples fit.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vggt_cache.context import CONTEXTS
from vggt_cache.errors import DataError
from vggt_cache.identity import DIGEST_BYTES, FeatureSpec, feature_key
from vggt_cache.precompute.digests import DigestTable, state_hash, state_hash_array
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.report import Reporter, count_of
from vggt_cache.samples import FrameTable, Problem, Sources, find_sources, iter_samples

Indexes = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of work that one process claims. `features` are indexes into the plan, the wanted ones only."""

    block_id: str
    features: Indexes


class Plan:
    """The features that a data set needs, in the order of their first appearance. Each belongs to a frame list."""

    def __init__(self, sources: Sources, context: str, max_samples: int = -1) -> None:
        self.sources = sources
        self.context = CONTEXTS[context]
        self.sample_count = 0
        self.text_only_count = 0
        self._max_samples = max_samples
        self.frames = FrameTable()
        self._sample_frames = np.empty(0, np.int64)
        self._sample_offsets = np.zeros(1, np.int64)
        self._lists = np.empty(0, np.int64)
        self._offsets = np.zeros(1, np.int64)

    def read_samples(self, on_problem: Callable[[Problem], None]) -> None:
        """Read all annotations and the metadata of all images. Takes seconds for 100,000 samples."""
        references, offsets = array("q"), array("q", [0])
        for sample in iter_samples(self.sources, on_problem=on_problem):
            self.sample_count += 1
            if sample.frames:
                references.extend(self.frames.add(sample))
                offsets.append(len(references))
            else:
                self.text_only_count += 1
        self.frames.resolve()
        frame_of = np.fromiter(self.frames.frame_ids(), np.int64)
        self._sample_frames = (
            frame_of[np.frombuffer(references, np.int64)] if len(references) else self._sample_frames
        )
        self._sample_offsets = np.frombuffer(offsets, np.int64)
        self._lists, self._offsets = _distinct_lists(
            *self.context.wanted_lists(self._sample_frames, self._sample_offsets)
        )

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

    @property
    def passes_per_epoch(self) -> int:
        """Frame passes through the encoder that training without a cache makes in one epoch."""
        lengths = np.diff(self._sample_offsets).tolist()
        return sum(
            times * len(self.context.used(range(length))) for length, times in Counter(lengths).items()
        )

    def passes(self, features: Indexes | None = None) -> tuple[int, int]:
        """Frame passes for these features (default: all wanted) without and with sharing of common prefixes."""
        chosen = np.arange(len(self)) if features is None else features
        starts, lengths = self._offsets[chosen], np.diff(self._offsets)[chosen]
        unshared = int(lengths.sum())
        if not self.context.shares_prefixes:
            return unshared, unshared
        return unshared, _distinct_prefixes(self._lists, starts, lengths)

    @cached_property
    def blocks(self) -> list[Block]:
        """All work. A block's id depends on the data alone, so that processes with other limits agree on it."""
        names = self._name_hashes()
        blocks = []
        for features in self._feature_groups():
            hasher = hashlib.blake2b(digest_size=16)
            for feature in features:
                hasher.update(names[self.frames_of(feature)].tobytes() + b"|")
            wanted = features[features < len(self)]
            if len(wanted):
                blocks.append(Block(block_id=hasher.hexdigest(), features=wanted))
        return blocks

    def state_hashes(self) -> npt.NDArray[np.uint64]:
        """For each frame, the hash of its file's present state [frames, 2]; zeros where it is missing."""
        states = (self.frames.state(frame) for frame in range(len(self.frames.paths)))
        return state_hash_array(
            state_hash(path, state) if state else b"\0" * 16
            for path, state in zip(self.frames.paths, states, strict=True)
        )

    def _feature_groups(self) -> Iterator[Indexes]:
        """Whole trees of lists that start with the same frame, since only these share prefixes; neighbours together."""
        _, appeared, tree = np.unique(self._lists[self._offsets[:-1]], return_index=True, return_inverse=True)
        order = np.argsort(appeared[tree], kind="stable")
        ends = np.flatnonzero(np.diff(appeared[tree][order], append=-1)) + 1
        at = 0
        while at < len(order):
            enough = np.searchsorted(ends, at + self.context.features_per_block)
            end = int(ends[min(int(enough), len(ends) - 1)])
            yield order[at:end]
            at = end

    def _name_hashes(self) -> npt.NDArray[np.void]:
        """16 bytes for each frame's path below the data root: nodes may mount the root in different places."""
        root = self.sources.root.rstrip("/") + "/"
        names = (path.removeprefix(root).encode("utf-8", "surrogateescape") for path in self.frames.paths)
        hashes = b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in names)
        return np.frombuffer(hashes, np.dtype("V16"))


class KnownKeys:
    """Keys of those features whose frames' digests are known without opening an image."""

    def __init__(self, plan: Plan, spec: FeatureSpec, table: DigestTable) -> None:
        self.plan = plan
        self.spec = spec
        self._table = table
        self._states = plan.state_hashes()
        self._known = np.zeros(len(self._states), np.bool_)
        self._read_here = np.zeros(len(self._states), np.bool_)
        self._digests = np.zeros((len(self._states), DIGEST_BYTES), np.uint8)
        self._refresh_digests()

    def reload(self) -> None:
        """Take in digests that other processes have found meanwhile."""
        if self._table.reload():
            self._refresh_digests()

    def learn(self, frame: int, digest: bytes) -> None:
        """This process has read the frame itself."""
        self._known[frame] = self._read_here[frame] = True
        self._digests[frame] = np.frombuffer(digest, np.uint8)

    def key(self, feature: int) -> bytes | None:
        """The feature's key, or None while a frame of it has not been read in its present state."""
        frames = self.plan.frames_of(feature)
        if not self._known[frames].all():
            return None
        return feature_key(self.spec, [self._digests[frame].tobytes() for frame in frames])

    def _refresh_digests(self) -> None:
        known, digests = self._table.lookup(self._states)
        fresh = known & self._states.any(axis=1) & ~self._read_here
        self._known |= fresh
        self._digests[fresh] = digests[fresh]


def make_plan(data_root: str, context: str, max_samples: int, on_problem: Callable[[Problem], None]) -> Plan:
    """Find and read everything below `data_root`. Raises DataError."""
    plan = Plan(find_sources(data_root), context, max_samples)
    plan.read_samples(on_problem)
    return plan


def plan_and_tell(
    data_root: str, context: str, max_samples: int, reporter: Reporter, failures: FailureLog
) -> Plan:
    """The same, telling what was found in the guide's words. Raises DataError, also where no frame is named."""
    reporter.info(f"Scanning data root: {data_root}")
    plan = make_plan(data_root, context, max_samples, lambda bad: failures.add(bad.where, bad.reason))
    sources = plan.sources
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
            f"no sample below {data_root} names a frame, so there is nothing to compute: check --data_root, and the "
            "names of the fields (images, image, history_images and current_image)"
        )
    return plan


def _distinct_lists(frames: Indexes, offsets: Indexes) -> tuple[Indexes, Indexes]:
    """Each different list once, in the order of first appearance."""
    if len(frames) == len(offsets) - 1 and (offsets == np.arange(len(offsets))).all():
        values, first = np.unique(
            frames, return_index=True
        )  # lists of one frame each, perhaps of millions of images
        return values[np.argsort(first)], np.arange(len(values) + 1)
    seen: set[bytes] = set()
    kept = array("q")
    for index in range(len(offsets) - 1):
        content = frames[offsets[index] : offsets[index + 1]].tobytes()
        name = hashlib.blake2b(content, digest_size=16).digest()
        if name not in seen:
            seen.add(name)
            kept.append(index)
    chosen = np.frombuffer(kept, np.int64) if len(kept) else np.empty(0, np.int64)
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

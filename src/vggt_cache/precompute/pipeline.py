"""Blocks of work through one process: decoded ahead, encoded, written; all at the same time.

    task ──> decode workers ──> encoder ──> writer's threads ──> committed shard, outcome told
             (begun ahead)    (this thread)

Nothing is computed that the store has, and nothing is stored under any key but that of the bytes decoded for it.
Where tasks come from is the business of others: of claims in `claimed.py`, of a driver in `ray_actor.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from vggt_cache.codec import NONE
from vggt_cache.errors import FrameError
from vggt_cache.identity import FeatureSpec, feature_key, pixel_key
from vggt_cache.precompute.decode import DecodedFrame
from vggt_cache.precompute.encode import BatchEncoder, of_one_dtype
from vggt_cache.precompute.plan import Task
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.settings import QwenLimits
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import StoredKeys
from vggt_cache.precompute.write import FeatureWriter
from vggt_cache.store import ShardWriter

Decoding = dict[int, Callable[[], DecodedFrame]]
"""The frames of a task, as they are asked for."""
Same = tuple[bytes, bytes, FeatureSpec]
"""The key of a feature's pixels, the key that it is stored under, and in which store: or the other way round."""


@dataclass(kw_only=True)
class Outcome:
    """What became of a task. It is told when all of the task's features are on the disk, or lost."""

    block_id: str
    written: int = 0
    """Features that this process computed, and that are on the disk now."""
    elsewhere: int = 0
    """Features that turned out to be stored already."""
    lost: list[str] = field(default_factory=list)
    """Labels of features that could not be computed, or not be stored."""
    digests: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)
    """Of each frame that was read its digest, and the hash of its file's state, which may be empty."""
    same: list[Same] = field(default_factory=list)

    @property
    def rows(self) -> list[tuple[bytes, bytes]]:
        """For the table of digests."""
        return [(state, digest) for digest, state in self.digests.values() if state]


@dataclass(kw_only=True)
class Tally:
    """What became of all tasks."""

    committed: int = 0
    """Features on disk, written by this run."""
    elsewhere: int = 0
    """Features that turned out to be stored already."""
    lost: list[str] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.committed += outcome.written
        self.elsewhere += outcome.elsewhere
        self.lost += outcome.lost


@dataclass(kw_only=True)
class Pipeline(AbstractContextManager["Pipeline"]):
    """For one store. What is called here raises VggtCacheError; what was committed until then stays committed."""

    stored: StoredKeys
    encoder: BatchEncoder
    submit: Callable[[int, str], Callable[[], DecodedFrame]]
    """Begins to decode a frame, of which number and path are given; what is returned waits for the result."""
    store_dir: str
    shard_bytes: int
    reporter: Reporter
    stop: StopRequest
    codec: str = NONE
    limits: QwenLimits | None = None
    on_outcome: Callable[[Outcome], object]
    """Called in the committing thread."""
    on_read: Callable[[int, bytes], object] = lambda frame, digest: None
    on_written: Callable[[int], object] = lambda features: None
    """Called in the writing thread."""
    on_progress: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.spec = self.stored.cache.spec
        self.waits_for = "the first block"
        """What this thread is at, for whoever wonders."""
        self._grids: set[tuple[int, int]] = set()
        self._not_stored: set[str] = set()
        self._writer = FeatureWriter(
            new_shard=lambda: ShardWriter(self.store_dir, self.spec, codec=self.codec),
            feature_dtype=self.spec.feature_dtype,
            shard_bytes=self.shard_bytes,
            on_written=self.on_written,
            on_bad_feature=self._not_storable,
        )

    def __exit__(self, *exc: object) -> None:
        """Commit what was handed to the writer, and end its threads."""
        self.waits_for = "the disk"
        self._writer.close()

    def flush(self) -> None:
        """Commit all; returns when all outcomes are told."""
        self.waits_for = "the disk"
        self._writer.flush()

    def begin(self, task: Task) -> Decoding:
        return {frame: self.submit(frame, path) for frame, path in task.paths.items()}

    def compute(self, task: Task, decoding: Decoding) -> None:
        """Returns when all is with the writer, or when asked to stop: the outcome tells of what was done until then."""
        decoded = self._decode(task, decoding)
        if self.stop.requested:
            return
        outcome, put = Outcome(block_id=task.block_id), list[str]()
        outcome.digests = {frame: (one.digest, one.state_hash) for frame, one in decoded.items()}
        places = range(len(task.lists))
        work = [(key, at) for at in places if (key := self._new_key(task, at, decoded, outcome)) is not None]
        lists = [task.lists[at] for _, at in work]
        self.waits_for = "the encoder"
        pixels = of_one_dtype({frame: one.pixels for frame, one in decoded.items()})
        for part, encoded in self.spec.context_rule.encode(self.encoder, lists, pixels):
            self.waits_for = "the disk"
            labels = [task.labels[work[number][1]] for number in part]
            self._writer.put([work[number][0] for number in part], labels, encoded)
            put += labels
            self.on_progress()
            if self.stop.requested:
                break
            self.waits_for = "the encoder"
        for number in self.encoder.too_large:
            key, at = work[number]
            self.stored.own.discard(key)
            self._lose(outcome, task.labels[at], self._too_large(len(task.lists[at])))
        self._writer.when_committed(lambda: self._finish(outcome, put))

    def _decode(self, task: Task, decoding: Decoding) -> dict[int, DecodedFrame]:
        """The task's frames, without those that cannot be used."""
        decoded = {}
        for frame, result in decoding.items():
            if self.stop.requested:
                break
            path = task.paths[frame]
            self.waits_for = f"the decoding of {path}"
            one = result()
            self.on_progress()
            if one.error:
                self.reporter.failed(path, one.error)
                continue
            decoded[frame] = one
            if one.remark:
                self.reporter.remark(path, one.remark)
            self.on_read(frame, one.digest)
        return decoded

    def _new_key(
        self, task: Task, at: int, decoded: dict[int, DecodedFrame], outcome: Outcome
    ) -> bytes | None:
        """The key of the feature at this place, from the very bytes that were decoded.

        None where it cannot be computed, and where the cache has it already, be it by the key of the pixels. `outcome`
        gets the pair of the two keys.
        """
        used = [decoded.get(frame) for frame in task.lists[at]]
        frames = [one for one in used if one is not None]
        grids = {one.grid for one in frames}
        if len(frames) < len(used):
            outcome.lost.append(task.labels[at])
            return None
        if reason := self._unfit(grids):
            self._lose(outcome, task.labels[at], reason)
            return None
        for grid in grids - self._grids:
            if self.limits and (complaint := self.limits.complaint(grid)):
                self.reporter.warn(complaint)
        self._grids |= grids
        key = feature_key(self.spec, [one.digest for one in frames])
        by_pixels = pixel_key(self.spec, [one.pixel_digest for one in frames])
        elsewhere = None if key in self.stored else self.stored.by_pixels(by_pixels)
        if elsewhere is not None:
            outcome.same.append((key, *elsewhere))
        elif key != by_pixels:
            outcome.same.append((by_pixels, key, self.spec))
        if elsewhere is not None or key in self.stored:
            outcome.elsewhere += 1
            return None
        self.stored.own.add(key)
        return key

    def _unfit(self, grids: set[tuple[int, int]]) -> str:
        """Why there is no feature of frames with these patch grids; empty where there is one."""
        if len(grids) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(grids))
            return (
                f"its frames have different patch grids ({sizes}), for which features of a list are not defined; "
                "give all frames of a list one size"
            )
        try:
            self.spec.shape(next(iter(grids)))
        except FrameError as error:
            return str(error)
        return ""

    def _lose(self, outcome: Outcome, label: str, reason: str) -> None:
        outcome.lost.append(label)
        self.reporter.failed(label, reason)

    def _too_large(self, frames: int) -> str:
        what = f"its list of {frames} frames" if frames > 1 else "the image"
        return (
            f"{what} does not fit into the memory of {self.encoder.device}, even alone: use a device with more "
            "memory, a smaller --image_size, or shorter lists"
        )

    # ------------------------------------------------------------ in the writer's threads

    def _not_storable(self, label: str, reason: str) -> None:
        self._not_stored.add(label)
        self.reporter.failed(label, reason)

    def _finish(self, outcome: Outcome, put: list[str]) -> None:
        lost = [label for label in put if label in self._not_stored]
        outcome.lost += lost
        outcome.written = len(put) - len(lost)
        self.on_outcome(outcome)

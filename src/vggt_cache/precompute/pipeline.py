"""One process's share of the work: claim blocks, decode ahead, encode, write; all four at the same time.

    claimed block ──> decode workers ──> encoder ──> writer's threads ──> committed shard, claim given back
      (at most two ahead)              (this thread)

Nothing is computed that the store has, and nothing is stored under any key but that of the bytes decoded for it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vggt_cache.codec import NONE
from vggt_cache.errors import FrameError
from vggt_cache.identity import FeatureSpec, feature_key, pixel_key
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodedFrame, DecodePool
from vggt_cache.precompute.encode import BatchEncoder, of_one_dtype
from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.report import Reporter, count_of, seconds_text
from vggt_cache.precompute.settings import QwenLimits
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored
from vggt_cache.precompute.todo import Todo
from vggt_cache.precompute.write import FeatureWriter
from vggt_cache.store import ShardWriter
from vggt_cache.store.directory import CLAIMS_FOLDER
from vggt_cache.store.writer import shard_bytes

Decoding = dict[int, Callable[[], DecodedFrame]]
"""The frames of a claimed block, as they are asked for."""


@dataclass(kw_only=True)
class Run:
    """One process's part in filling a store: takes blocks, which other processes may take too, and an encoder."""

    stored: Stored
    reporter: Reporter
    stop: StopRequest
    num_workers: int
    codec: str = NONE
    limits: QwenLimits | None = None

    def __post_init__(self) -> None:
        self.known, self.plan, self.spec = self.stored.known, self.stored.known.plan, self.stored.known.spec
        self.committed = 0
        """Features on disk, written by this process."""
        self.elsewhere = 0
        """Features that turned out to be stored already."""
        self.lost: list[str] = []
        """Labels of features that could not be computed, or not be stored."""
        self._grids: set[tuple[int, int]] = set()
        self._waits_for, self._waiting_said = "the first block", False

    def compute(self, blocks: Sequence[Block], encoder: BatchEncoder) -> None:
        """Returns when every feature of the blocks is stored or lost, or when asked to stop; all is committed then.

        Raises VggtCacheError; what was committed until then stays committed.
        """
        self._encoder = encoder
        store_dir = os.path.join(self.stored.cache.cache_dir, self.spec.short_name)
        total, noun = sum(len(block.features) for block in blocks), self.spec.context_rule.noun
        with (
            DecodePool(self.num_workers, self.spec.preprocessing) as self._decoder,
            self.reporter.bar(total, noun) as self._bar,
            Claims(os.path.join(store_dir, CLAIMS_FOLDER), on_silence=self._tell_silence) as self._claims,
            self.stop.deferred(),
        ):
            self._todo = Todo(
                blocks, self._claims, self.stored, place=self._place(), on_finished=self._found_elsewhere
            )
            self._writer = FeatureWriter(
                new_shard=lambda: ShardWriter(store_dir, self.spec, codec=self.codec),
                feature_dtype=self.spec.feature_dtype,
                shard_bytes=shard_bytes(),
                on_written=self._written,
                on_bad_feature=self._lose,
            )
            try:
                self._go_through()
            finally:
                self._waits_for = "the disk"
                self._writer.close()
                self.committed = self._writer.committed
        self.stored.cache.refresh()
        self.stored.cache.save_index()

    def _place(self) -> float | None:
        """Where to begin among the blocks: each rank elsewhere; None, by chance, where no launcher counts them."""
        return self.reporter.rank / self.reporter.world_size if self.reporter.world_size > 1 else None

    def _go_through(self) -> None:
        opened: deque[tuple[Block, Decoding]] = deque()
        while (len(self._todo) or opened) and not self.stop.requested:
            while len(opened) < self._todo.ahead and (block := self._todo.take()) is not None:
                opened.append((block, self._begin_decoding(block)))
            if opened:
                self._compute(*opened.popleft())
            elif len(self._todo):
                self._wait_for_others()

    def _begin_decoding(self, block: Block) -> Decoding:
        frames = dict.fromkeys(f for one in block.features for f in self.plan.frames_of(one).tolist())
        return {frame: self.plan.frames.submit(frame, self._decoder) for frame in frames}

    def _wait_for_others(self) -> None:
        """All that is left is claimed by other processes, which may in turn wait for what is held here."""
        self._waits_for = "the disk"
        self._writer.flush()
        self._claims.progressed()  # nothing is held now, so waiting for others is no hang
        if not self._todo.wait():
            return
        if not self._waiting_said:
            self._waiting_said = True
            blocks = count_of(len(self._todo), "block")
            self.reporter.info(f"Waiting for {blocks} that other processes are computing")
        self.stop.wait(self._todo.pause_s)

    def _compute(self, block: Block, decoding: Decoding) -> None:
        decoded = self._decode(decoding)
        if self.stop.requested:
            return
        same: list[tuple[bytes, bytes, FeatureSpec]] = []
        work = [
            (key, one) for one in block.features if (key := self._new_key(one, decoded, same)) is not None
        ]
        lists = [self.plan.frames_of(feature).tolist() for _, feature in work]
        self._waits_for = "the encoder"
        pixels = of_one_dtype({frame: one.pixels for frame, one in decoded.items()})
        for part, encoded in self.spec.context_rule.encode(self._encoder, lists, pixels):
            self._waits_for = "the disk"
            labels = [self.plan.label(work[at][1]) for at in part]
            self._writer.put([work[at][0] for at in part], labels, encoded)
            self._claims.progressed()
            if self.stop.requested:
                break
            self._waits_for = "the encoder"
        for at in self._encoder.too_large:
            self._lose_too_large(*work[at], len(lists[at]))
        rows = [(one.state_hash, one.digest) for one in decoded.values() if one.state_hash]
        self._writer.when_committed(lambda: self._done(block, rows, same))

    def _decode(self, decoding: Decoding) -> dict[int, DecodedFrame]:
        """The block's frames, without those that cannot be used."""
        decoded = {}
        for frame, result in decoding.items():
            if self.stop.requested:
                break
            path = self.plan.frames.paths[frame]
            self._waits_for = f"the decoding of {path}"
            one = result()
            self._claims.progressed()
            if one.error:
                self.reporter.failed(path, one.error)
                continue
            decoded[frame] = one
            if one.remark:
                self.reporter.remark(path, one.remark)
            self.known.learn(frame, one.digest)
        return decoded

    def _new_key(
        self, feature: int, decoded: dict[int, DecodedFrame], same: list[tuple[bytes, bytes, FeatureSpec]]
    ) -> bytes | None:
        """The feature's key, from the very bytes that were decoded.

        None where it cannot be computed, and where the cache has it already, be it by the key of the pixels. `same`
        gets the pair of the two keys.
        """
        used = [decoded.get(frame) for frame in self.plan.frames_of(feature).tolist()]
        frames = [one for one in used if one is not None]
        grids = {one.grid for one in frames}
        reason = self._unfit(grids) if len(frames) == len(used) else ""
        if len(frames) < len(used) or reason:
            label = self.plan.label(feature)
            if reason:
                self.reporter.failed(label, reason)
            self.lost.append(label)
            self._shorten(1)
            return None
        for grid in grids - self._grids:
            if self.limits and (complaint := self.limits.complaint(grid)):
                self.reporter.warn(complaint)
        self._grids |= grids
        key = feature_key(self.spec, [one.digest for one in frames])
        by_pixels = pixel_key(self.spec, [one.pixel_digest for one in frames])
        elsewhere = None if key in self.stored else self.stored.by_pixels(by_pixels)
        if elsewhere is not None:
            same.append((key, *elsewhere))
        elif key != by_pixels:
            same.append((by_pixels, key, self.spec))
        if elsewhere is not None or key in self.stored:
            self._found_elsewhere(1)
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

    def _found_elsewhere(self, features: int) -> None:
        self.elsewhere += features
        self._shorten(features)

    def _shorten(self, features: int) -> None:
        self._bar.total = (self._bar.total or 0) - features  # drawn with the next feature that is written

    def _written(self, features: int) -> None:  # this one and those below: in other threads
        self._bar.update(features)
        self._claims.progressed()

    def _lose(self, label: str, reason: str) -> None:
        self.lost.append(label)
        self.reporter.failed(label, reason)

    def _lose_too_large(self, key: bytes, feature: int, frames: int) -> None:
        self.stored.own.discard(key)
        what = f"its list of {frames} frames" if frames > 1 else "the image"
        self._lose(
            self.plan.label(feature),
            f"{what} does not fit into the memory of {self._encoder.device}, even alone: use a device with more "
            "memory, a smaller --image_size, or shorter lists",
        )
        self._shorten(1)

    def _done(
        self,
        block: Block,
        rows: list[tuple[bytes, bytes]],
        same: list[tuple[bytes, bytes, FeatureSpec]],
    ) -> None:
        """A block is on disk: note what was found out first, then tell of it, so that others find all done."""
        self.known.table.append(rows)
        self.stored.same.note(same)
        lost = frozenset(self.lost)
        shows = all(self.stored.shows_others(f) and self.plan.label(f) not in lost for f in block.features)
        self._todo.done(block.block_id, shows=shows)

    def _tell_silence(self, seconds: float) -> None:
        """Nothing was decoded, encoded or written for so long. The run goes on waiting: a mount may come back."""
        self.reporter.warn(
            f"nothing has moved for {seconds_text(seconds)}, waiting for {self._waits_for}: other processes may take "
            f"over what this one has claimed; check its disk and device; kill -9 {os.getpid()} ends this run where "
            "another signal does not, and loses nothing that is committed"
        )

"""The running of a plan: claim blocks, decode ahead, encode, write; all four at the same time.

    claimed block ──> decode workers ──> encoder ──> writer's threads ──> committed shard, claim given back
        (two blocks ahead)             (this thread)

Nothing is computed that the store has, and nothing is stored under any key but that of the bytes which
were decoded for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from vggt_cache.identity import feature_key
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodedFrame, DecodePool, PendingFrame
from vggt_cache.precompute.encode import BatchEncoder, Encoded, Pixels
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.observer import RunObserver
from vggt_cache.precompute.plan import Block, KnownKeys
from vggt_cache.precompute.present import Present
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.write import BlockDone, FeatureWriter

BLOCKS_AHEAD = 3
_POLL_S = 0.5


@dataclass(frozen=True, kw_only=True)
class _OpenBlock:
    """A claimed block whose frames are being decoded."""

    block: Block
    features: list[int]
    frames: dict[int, PendingFrame]


@dataclass(kw_only=True)
class Pipeline:
    """One process's share of a plan. `run` returns when every wanted feature is stored or has failed."""

    known: KnownKeys
    present: Present
    claims: Claims
    decoder: DecodePool
    encoder: BatchEncoder
    writer: FeatureWriter
    failures: FailureLog
    stop: StopRequest
    observer: RunObserver
    failed: set[int] = field(default_factory=set)
    """Wanted features that could not be computed."""

    def __post_init__(self) -> None:
        self.plan, self.spec = self.known.plan, self.known.spec

    def run(self, pending: set[int]) -> None:
        """Compute the `pending` features of the plan (indexes)."""
        blocks = ((block, [f for f in block.features.tolist() if f in pending]) for block in self.plan.blocks)
        todo = deque(entry for entry in blocks if entry[1])
        opened: deque[_OpenBlock] = deque()
        while (todo or opened) and not self.stop.requested:
            while len(opened) < BLOCKS_AHEAD and (claimed := self._claim_next(todo)) is not None:
                if claimed.features:
                    opened.append(claimed)
            if opened:
                self._compute(opened.popleft())
            elif todo:
                self._wait_for_others()

    def _claim_next(self, todo: deque[tuple[Block, list[int]]]) -> _OpenBlock | None:
        """Claim the first free block and look again at what is missing of it: others may have been here."""
        for _ in range(len(todo)):
            block, features = todo.popleft()
            if not self.claims.try_claim(block.block_id):
                todo.append((block, features))
                continue
            self.known.reload()
            self.present.refresh()
            missing = [feature for feature in features if not self._is_present(feature)]
            self.observer.found_elsewhere(len(features) - len(missing))
            if not missing:
                self.claims.release(block.block_id)
            frames = dict.fromkeys(
                frame for feature in missing for frame in self.plan.frames_of(feature).tolist()
            )
            paths = [self.plan.frames.paths[frame] for frame in frames]
            return _OpenBlock(
                block=block,
                features=missing,
                frames=dict(zip(frames, self.decoder.submit(paths), strict=True)),
            )
        return None

    def _is_present(self, feature: int) -> bool:
        key = self.known.key(feature)
        return key is not None and key in self.present

    def _wait_for_others(self) -> None:
        """All that is left is claimed by other processes, which may in turn wait for what is held here."""
        self.observer.waits_for = "the disk"
        self.writer.flush()
        self.claims.progressed()  # nothing is held now, so waiting for others is no hang
        self.observer.waiting(self.claims.held_by_others())
        self.stop.wait(_POLL_S)

    # ------------------------------------------------------------ one block

    def _compute(self, opened: _OpenBlock) -> None:
        decoded = self._decode(opened)
        if self.stop.requested:
            return
        features = [feature for feature in opened.features if self._is_usable(feature, decoded)]
        self.observer.failed(len(opened.features) - len(features))
        work = [
            (key, feature) for feature in features if (key := self._new_key(feature, decoded)) is not None
        ]
        lists = [self.plan.frames_of(feature).tolist() for _, feature in work]
        self.observer.waits_for = "the encoder"
        for part, encoded in self._encode(lists, {frame: one.pixels for frame, one in decoded.items()}):
            self.observer.waits_for = "the disk"
            labels = [self.plan.label(work[at][1]) for at in part]
            self.writer.put([work[at][0] for at in part], labels, encoded)
            self.claims.progressed()
            if self.stop.requested:
                break
            self.observer.waits_for = "the encoder"
        self.writer.finish_block(BlockDone(block_id=opened.block.block_id, rows=_rows(decoded)))

    def _decode(self, opened: _OpenBlock) -> dict[int, DecodedFrame]:
        """The block's frames, without those that cannot be used."""
        decoded = {}
        for frame, pending in opened.frames.items():
            if self.stop.requested:
                break
            self.observer.waits_for = f"the decoding of {pending.path}"
            one = self.decoder.result(pending)
            self.claims.progressed()
            if one.error:
                self.failures.add(pending.path, one.error)
                continue
            decoded[frame] = one
            self.known.learn(frame, one.digest)
        return decoded

    def _is_usable(self, feature: int, decoded: dict[int, DecodedFrame]) -> bool:
        frames = self.plan.frames_of(feature).tolist()
        if any(frame not in decoded for frame in frames):
            self.failed.add(feature)
            return False
        grids = {decoded[frame].grid for frame in frames}
        if len(grids) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(grids))
            self.failures.add(
                self.plan.label(feature),
                f"its frames have different patch grids ({sizes}), for which features of a list are not "
                "defined; give all frames of a list one size",
            )
            self.failed.add(feature)
            return False
        self.observer.grid_seen(grids.pop())
        return True

    def _new_key(self, feature: int, decoded: dict[int, DecodedFrame]) -> bytes | None:
        """The feature's key, from the very bytes that were decoded; None where the store has it already."""
        key = feature_key(
            self.spec, [decoded[frame].digest for frame in self.plan.frames_of(feature).tolist()]
        )
        if key in self.present:
            self.observer.found_elsewhere(1)
            return None
        self.present.add(key)
        return key

    def _encode(self, lists: list[list[int]], pixels: dict[int, Pixels]) -> Iterator[Encoded]:
        return self.spec.context_rule.encode(self.encoder, lists, pixels)


def _rows(decoded: dict[int, DecodedFrame]) -> list[tuple[bytes, bytes]]:
    return [(one.state_hash, one.digest) for one in decoded.values() if one.state_hash]

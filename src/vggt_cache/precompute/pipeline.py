"""The running of a plan: claim blocks, decode ahead, encode, write; all four at the same time.

    claimed block ──> decode workers ──> encoder ──> writer's threads ──> committed shard, claim given back
        (two blocks ahead)             (this thread)

Nothing is computed that the store has, and nothing is stored under any key but that of the bytes which
were decoded for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from vggt_cache.identity import FeatureSpec, feature_key
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.decode import DecodedFrame, DecodePool, PendingFrame
from vggt_cache.precompute.digests import settled, signature
from vggt_cache.precompute.encode import BatchEncoder, Encoded, Pixels
from vggt_cache.precompute.failures import FailureLog
from vggt_cache.precompute.plan import Block, KnownKeys, Plan
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.write import BlockDone, FeatureWriter
from vggt_cache.store import FeatureCache

BLOCKS_AHEAD = 3
SHARDS_BETWEEN_INDEXES = 64
_POLL_S = 0.5


class Present:
    """Which features the store has already. `recompute` counts only shards that are new since the start."""

    def __init__(self, cache: FeatureCache, *, recompute: bool) -> None:
        self._cache = cache
        self._ignored = frozenset(cache.shard_names()) if recompute else frozenset()
        self._own: set[bytes] = set()
        self._indexed_shards = len(cache.shard_names())

    def __contains__(self, key: bytes) -> bool:
        if key in self._own:
            return True
        if not self._ignored:
            return key in self._cache
        shard = self._cache.shard_of(key)
        return shard is not None and shard not in self._ignored

    def add(self, key: bytes) -> None:
        """This process has handed the feature to its writer."""
        self._own.add(key)

    def refresh(self) -> None:
        """Take in what other processes have committed."""
        self._cache.refresh()
        shards = len(self._cache.shard_names())
        if shards - self._indexed_shards >= SHARDS_BETWEEN_INDEXES:
            # Shards that no index covers are merged anew at each refresh: keep them few.
            self._cache.save_index()
            self._indexed_shards = shards


@dataclass(frozen=True, kw_only=True)
class _OpenBlock:
    """A claimed block whose frames are being decoded."""

    block: Block
    features: list[int]
    frames: dict[int, PendingFrame]


class Observer(Protocol):
    """Who is told how a run goes."""

    def found_elsewhere(self, features: int) -> None:
        """Features turned out to be stored already, by another process or under another path."""

    def failed(self, features: int) -> None:
        """Features cannot be computed."""

    def waiting(self, blocks: int) -> None:
        """Nothing is left but what other processes are computing."""

    def grid_seen(self, grid: tuple[int, int]) -> None:
        """Frames with this patch grid (h, w) are about to be encoded."""


class Pipeline:
    """One process's share of a plan. `run` returns when every wanted feature is stored or has failed."""

    def __init__(
        self,
        *,
        plan: Plan,
        spec: FeatureSpec,
        known: KnownKeys,
        present: Present,
        claims: Claims,
        decoder: DecodePool,
        encoder: BatchEncoder,
        writer: FeatureWriter,
        failures: FailureLog,
        stop: StopRequest,
        observer: Observer,
    ) -> None:
        self._plan = plan
        self._spec = spec
        self._known = known
        self._present = present
        self._claims = claims
        self._decoder = decoder
        self._encoder = encoder
        self._writer = writer
        self._failures = failures
        self._stop = stop
        self._observer = observer
        self.failed: set[int] = set()
        """Wanted features that could not be computed."""

    def run(self, pending: set[int]) -> None:
        """Compute the `pending` features of the plan (indexes)."""
        blocks = deque(
            (block, [f for f in block.features.tolist() if f in pending]) for block in self._plan.blocks
        )
        todo = deque(entry for entry in blocks if entry[1])
        opened: deque[_OpenBlock] = deque()
        while (todo or opened) and not self._stop.requested:
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
            if not self._claims.try_claim(block.block_id):
                todo.append((block, features))
                continue
            self._known.reload()
            self._present.refresh()
            missing = [feature for feature in features if not self._is_present(feature)]
            self._observer.found_elsewhere(len(features) - len(missing))
            if not missing:
                self._claims.release(block.block_id)
            frames = dict.fromkeys(
                frame for feature in missing for frame in self._plan.frames_of(feature).tolist()
            )
            paths = [self._plan.frames.paths[frame] for frame in frames]
            return _OpenBlock(
                block=block,
                features=missing,
                frames=dict(zip(frames, self._decoder.submit(paths), strict=True)),
            )
        return None

    def _is_present(self, feature: int) -> bool:
        key = self._known.key(feature)
        return key is not None and key in self._present

    def _wait_for_others(self) -> None:
        """All that is left is claimed by other processes, which may in turn wait for what is held here."""
        self._writer.flush()
        self._observer.waiting(self._claims.held_by_others())
        self._stop.wait(_POLL_S)

    # ------------------------------------------------------------ one block

    def _compute(self, opened: _OpenBlock) -> None:
        decoded = self._decode(opened)
        if self._stop.requested:
            return
        features = [feature for feature in opened.features if self._is_usable(feature, decoded)]
        self._observer.failed(len(opened.features) - len(features))
        work = [
            (key, feature) for feature in features if (key := self._new_key(feature, decoded)) is not None
        ]
        lists = [self._plan.frames_of(feature).tolist() for _, feature in work]
        for part, encoded in self._encode(lists, {frame: one.pixels for frame, one in decoded.items()}):
            labels = [self._plan.label(work[at][1]) for at in part]
            self._writer.put([work[at][0] for at in part], labels, encoded)
            self._claims.progressed()
            if self._stop.requested:
                break
        self._writer.finish_block(BlockDone(block_id=opened.block.block_id, rows=self._rows(decoded)))

    def _decode(self, opened: _OpenBlock) -> dict[int, DecodedFrame]:
        """The block's frames, without those that cannot be used."""
        decoded = {}
        for frame, pending in opened.frames.items():
            if self._stop.requested:
                break
            one = self._decoder.result(pending)
            self._claims.progressed()
            if one.error:
                self._failures.add(pending.path, one.error)
                continue
            decoded[frame] = one
            self._known.learn(frame, one.digest)
        return decoded

    def _is_usable(self, feature: int, decoded: dict[int, DecodedFrame]) -> bool:
        frames = self._plan.frames_of(feature).tolist()
        if any(frame not in decoded for frame in frames):
            self.failed.add(feature)
            return False
        grids = {decoded[frame].grid for frame in frames}
        if len(grids) > 1:
            sizes = ", ".join(f"{h}x{w}" for h, w in sorted(grids))
            self._failures.add(
                self._plan.label(feature),
                f"its frames have different patch grids ({sizes}), for which features of a list are not "
                "defined; give all frames of a list one size",
            )
            self.failed.add(feature)
            return False
        self._observer.grid_seen(grids.pop())
        return True

    def _new_key(self, feature: int, decoded: dict[int, DecodedFrame]) -> bytes | None:
        """The feature's key, from the very bytes that were decoded; None where the store has it already."""
        key = feature_key(
            self._spec, [decoded[frame].digest for frame in self._plan.frames_of(feature).tolist()]
        )
        if key in self._present:
            self._observer.found_elsewhere(1)
            return None
        self._present.add(key)
        return key

    def _encode(self, lists: list[list[int]], pixels: dict[int, Pixels]) -> Iterator[Encoded]:
        return self._spec.context_rule.encode(self._encoder, lists, pixels)

    def _rows(self, decoded: dict[int, DecodedFrame]) -> list[tuple[bytes, bytes]]:
        return [
            (signature(self._plan.frames.paths[frame], one.stat), one.digest)
            for frame, one in decoded.items()
            if one.stat is not None and settled(one.stat, one.read_at_ns)
        ]

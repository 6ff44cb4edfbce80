"""Which block goes to whom, where one driver hands out all work; and what has to be done again after a loss.

There is no engine here and no clock. A worker has a few blocks before it, the first of which it computes, and others
that it computed and that are not on the disk yet. When it is lost, all of these go back to the front of the queue.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.todo import MOST_AHEAD, size_class

MOST_ENDS = 3
"""A block with which so many workers have ended is given up."""


@dataclass
class _Hand:
    """What one worker has."""

    coming: deque[Block] = field(default_factory=deque)
    """Given to it and not computed yet, in this order."""
    unsaved: dict[str, Block] = field(default_factory=dict)
    """All that is not known to be on the disk, those coming too."""
    is_flushing: bool = False
    """It was told to commit all that it has, and was given nothing since."""


class Handout:
    """For workers that are named by numbers. Each is to be told what `orders` says, whenever anything has happened."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        # Large ones first, so that the last ones to be shared are small.
        self._waiting = deque(sorted(blocks, key=size_class, reverse=True))
        self._hands: dict[int, _Hand] = {}
        self._ends = Counter[str]()

    @property
    def is_finished(self) -> bool:
        """Everything is on the disk, or given up."""
        return not self._waiting and not any(hand.unsaved for hand in self._hands.values())

    @property
    def workers(self) -> list[int]:
        return list(self._hands)

    def join(self, worker: int) -> None:
        self._hands[worker] = _Hand()

    def orders(self, worker: int) -> Iterator[Block | None]:
        """Blocks to compute, in this order; None: commit all that you have."""
        hand = self._hands[worker]
        while self._waiting and len(hand.coming) < self._ahead:
            block = self._waiting.popleft()
            hand.coming.append(block)
            hand.unsaved[block.block_id] = block
            hand.is_flushing = False
            yield block
        if not self._waiting and hand.unsaved and not hand.is_flushing:
            hand.is_flushing = True
            yield None

    @property
    def _ahead(self) -> int:
        """How many blocks a worker should have before it: one alone when the others would find none else."""
        return min(MOST_AHEAD, 1 + len(self._waiting) // (2 * len(self._hands)))

    def computed(self, worker: int) -> None:
        """The first of its blocks."""
        self._hands[worker].coming.popleft()

    def saved(self, worker: int, block_id: str) -> None:
        del self._hands[worker].unsaved[block_id]

    def lost(self, worker: int) -> Block | None:
        """It has ended, or cannot be reached. Returns the block that it was computing if that is to be given up."""
        hand = self._hands.pop(worker)
        again = deque(hand.unsaved.values())
        given_up = None
        if hand.coming:
            suspect = hand.coming[0]
            self._ends[suspect.block_id] += 1
            if self._ends[suspect.block_id] == MOST_ENDS:
                again.remove(suspect)
                given_up = suspect
        self._waiting.extendleft(reversed(again))
        return given_up

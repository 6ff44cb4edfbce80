"""Which block a process takes next, and when it looks at what the others have done.

All processes have the same blocks before them. Each begins at a place of its own and goes round, the large blocks
first, so that they seldom meet before the end, and then over small blocks. Looking costs the encoder's time: listing
the claims, reading what digests and shards are new. So a look comes seldom, and what it showed counts until the next:
    a block that was claimed since is not got, as its claim cannot be created twice;
    one that was finished since is not got either, as its claim stays for several looks of whoever might come;
    one whose holder has ended since, and taken its claims along, is looked at again before it is computed.
What is known too late costs work that was done twice, never a wrong result.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vggt_cache.precompute.claims import Claims, Listing
from vggt_cache.precompute.plan import Block, Indexes

LOOK_EVERY_S = 5.0
"""At most so often, and seldom enough to take at most `SHARE` of the time."""
SHARE = 0.02
_WAITING_SHARE = 0.1
"""Who has nothing else to do may look more often, but spares the file server."""
_WAIT_S = 0.5
_KEPT_LOOKS, _KEPT_S = 4, 60.0
"""A finished block's claim stays for so many looks, and as long as a network file system may show an old folder."""
_ASKED_AFTER = 8
"""Blocks of others, taken by chance: so many owners are asked after in one look."""
MOST_AHEAD = 3
"""Blocks that a process holds: one is encoded, the others are decoded meanwhile."""


class Work(Protocol):
    """What is known of the features of blocks. `stored.Stored` is it."""

    def refresh(self) -> None:
        """Take in what other processes have committed."""

    def finished(self, features: Indexes) -> npt.NDArray[np.bool_]:
        """Of many features at once, which were stored when this was last refreshed [n]."""

    def missing(self, features: Iterable[int]) -> list[int]:
        """Those of a few features that are not stored."""


class Todo:
    """The blocks that nobody is known to have finished. Its length: without those that were taken here."""

    def __init__(
        self,
        blocks: Sequence[Block],
        claims: Claims,
        work: Work,
        *,
        place: float | None = None,
        on_finished: Callable[[int], object] = lambda features: None,
        clock_s: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`place`: where to begin, as a part of all, from 0 to 1; None: by chance.

        `on_finished` is called with a number of features that proved to be stored.
        """
        self._claims, self._work, self._on_finished, self._clock_s = claims, work, on_finished, clock_s
        self._chance = random.Random(claims.token)
        place = self._chance.random() if place is None else place
        self._left = {block.block_id: block for block in in_turn(blocks, place)}
        self._listing = Listing()
        self._of_others: list[str] = []
        self._kept: deque[tuple[float, str]] = deque()
        """Until when the claims of finished blocks stay. For the thread that commits, and `wait` while that rests."""
        self._listed_until_s = -float("inf")
        self.look()

    def __len__(self) -> int:
        return len(self._left)

    @property
    def ahead(self) -> int:
        """How many blocks a process should hold by now: one alone when the others would find none else."""
        processes = max(1, len(self._listing.marks))
        return min(MOST_AHEAD, 1 + len(self._free) // (2 * processes))

    @property
    def pause_s(self) -> float:
        """How long to wait for others before the next look."""
        return max(_WAIT_S, self._look_s / _WAITING_SHARE)

    def take(self) -> Block | None:
        """Claim the next free block, and tell what of it is missing; None where nothing is known to be free."""
        while True:
            if self._clock_s() >= self._look_again_s:
                self.look()
            if not self._free:
                return None
            block = self._free.popleft()
            if not self._claims.try_claim(block.block_id, self._listing):
                self._of_others.append(block.block_id)
                continue
            del self._left[block.block_id]
            if self._somebody_has_ended():
                self.look()
            missing = self._work.missing(block.features.tolist())
            self._tell_finished(len(block.features) - len(missing))
            if missing:
                return replace(block, features=np.array(missing, np.int64))
            self._claims.release(block.block_id)

    def done(self, block_id: str, *, shows: bool) -> None:
        """A block that was taken is on disk. `shows`: all of it is stored, so that a look will tell others.

        If not, its claim goes at once: another process may want to try what is missing. For the thread that commits.
        """
        if shows:
            kept_s = max(_KEPT_S, _KEPT_LOOKS * self._interval_s)
            self._kept.append((self._clock_s() + kept_s, block_id))
        else:
            self._claims.release(block_id)
        self._give_back()

    def wait(self) -> bool:
        """Nothing is free, and all that was taken here is done: look anew; whether there still is nothing to take."""
        self._give_back()
        self.look()
        return bool(self._left) and not self._free

    def look(self) -> None:
        """See what is claimed, then what is stored: so whatever is free by the listing is known if it is finished."""
        begun_s = self._clock_s()
        asked = self._chance.sample(self._of_others, min(_ASKED_AFTER, len(self._of_others)))
        self._listing = self._claims.look(asked)
        self._work.refresh()
        self._drop_finished()
        self._free = deque(block for block in self._left.values() if not self._listing.holds(block.block_id))
        self._of_others = [block_id for block_id in self._left if self._listing.holds(block_id)]
        now_s = self._clock_s()
        self._look_s = now_s - begun_s
        self._interval_s = max(LOOK_EVERY_S, self._look_s / SHARE)
        self._look_again_s = now_s + self._interval_s

    def _give_back(self) -> None:
        while self._kept and self._kept[0][0] <= self._clock_s():
            self._claims.release(self._kept.popleft()[1])

    def _drop_finished(self) -> None:
        blocks = list(self._left.values())
        if not blocks:
            return
        finished = self._work.finished(np.concatenate([block.features for block in blocks]))
        begins = np.cumsum([0, *(len(block.features) for block in blocks[:-1])])
        whole = np.logical_and.reduceat(finished, begins)
        for at in np.flatnonzero(whole).tolist():
            del self._left[blocks[at].block_id]
            self._tell_finished(len(blocks[at].features))

    def _somebody_has_ended(self) -> bool:
        """Whether a process that took part has gone, as far as the listing shows that is taken now, if it is due."""
        begun_s = self._clock_s()
        if begun_s < self._listed_until_s:
            return False
        before = self._listing
        self._listing = replace(self._claims.look(), dead=before.dead)
        now_s = self._clock_s()
        self._listed_until_s = now_s + (now_s - begun_s) / SHARE
        return not before.marks <= self._listing.marks

    def _tell_finished(self, features: int) -> None:
        if features:
            self._on_finished(features)


def in_turn(blocks: Sequence[Block], place: float) -> list[Block]:
    """The large blocks first, sizes that differ by less than two times as one; each size from `place` on and round."""
    by_size: dict[int, list[Block]] = {}
    for block in blocks:
        by_size.setdefault(len(block.features).bit_length(), []).append(block)
    order = []
    for size in sorted(by_size, reverse=True):
        alike = by_size[size]
        start = int(place * len(alike)) % len(alike)
        order += alike[start:] + alike[:start]
    return order

"""Which block a process takes next, and when it looks at what the others have done.

All processes have the same blocks before them. Each begins at a place of its own and goes on from there; where it meets
another, it goes on anywhere else, by chance. The large blocks come first, so that the last ones to be shared are small.
Looking costs the encoder's time: listing the claims, reading what digests and shards are new. So a look comes seldom,
and what it showed counts until the next:
    a block that was claimed since is not got, as its claim cannot be created twice;
    one that was finished since is not got either, as its claim stays for several looks of whoever might come;
    one whose holder has ended since, and taken its claims along, is looked at again before it is computed.
What is known too late costs work that was done twice, never a wrong result.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.plan import Block, Indexes

LOOK_EVERY_S = 5.0
"""At most so often, and seldom enough to take at most `SHARE` of the time."""
SHARE = 0.02
_WAITING_SHARE = 0.2
"""Who has nothing else to do may look more often, but spares the file server."""
_WAIT_S = 0.5
_KEPT_LOOKS, _OLD_FOLDER_S = 2, 60.0
"""A finished block's claim stays for so many looks, and as long as a network file system may show an old folder."""
_ASKED_AFTER = 8
"""Blocks of others, taken by chance: so many owners are asked after in one look."""
MOST_AHEAD = 3
"""Blocks that a process holds: one is encoded, the others are decoded meanwhile."""


class Seldom:
    """For what is to be done now and then: at most every `LOOK_EVERY_S`, and for at most `SHARE` of the time."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._again_s = clock_s() + LOOK_EVERY_S

    def do(self, job: Callable[[], object]) -> None:
        """If it is time."""
        begun_s = self._clock_s()
        if begun_s >= self._again_s:
            job()
            now_s = self._clock_s()
            self._again_s = now_s + max(LOOK_EVERY_S, (now_s - begun_s) / SHARE)


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
        """At least one block. `place`: where to begin, as a part of the large ones, from 0 to 1; None: by chance.

        `on_finished` is called with a number of features that proved to be stored.
        """
        self._claims, self._work, self._on_finished, self._clock_s = claims, work, on_finished, clock_s
        self._chance = np.random.default_rng(int(claims.token, 16))
        self._blocks = sorted(blocks, key=size_class, reverse=True)
        self._number_of = {block.block_id: number for number, block in enumerate(self._blocks)}
        self._sizes = np.array([len(block.features) for block in self._blocks], np.int64)
        self._classes = np.array([size_class(block) for block in self._blocks], np.int64)
        self._features = np.concatenate([block.features for block in self._blocks])
        self._left = np.ones(len(self._blocks), np.bool_)
        """Those that were not taken here, and that nobody is known to have finished."""
        alike = np.count_nonzero(self._classes == self._classes[0])
        self._next = int((self._chance.random() if place is None else place) * alike)
        """To be taken if it is free, before any other of its size; -1: none."""
        self._of_others: list[int] = []
        self._kept: deque[tuple[float, str]] = deque()
        """Until when the claims of finished blocks stay. For the thread that commits, and `wait` while that rests."""
        self._list_again_s = -float("inf")
        self.look()

    def __len__(self) -> int:
        return int(np.count_nonzero(self._left))

    @property
    def ahead(self) -> int:
        """How many blocks a process should hold by now: one alone when the others would find none else."""
        processes = max(1, len(self._listing.marks))
        return min(MOST_AHEAD, 1 + int(self._free.sum()) // (2 * processes))

    @property
    def kept_s(self) -> float:
        """How long the claim of a finished block stays."""
        return _OLD_FOLDER_S + _KEPT_LOOKS * self._interval_s

    @property
    def pause_s(self) -> float:
        """How long to wait for others before the next look."""
        return max(_WAIT_S, self._look_s / _WAITING_SHARE)

    def take(self) -> Block | None:
        """Claim the next free block, and tell what of it is missing; None where nothing is known to be free."""
        while True:
            if self._clock_s() >= self._look_again_s:
                self.look()
            if (number := self._choose()) < 0:
                return None
            block = self._blocks[number]
            self._free[number] = False
            if not self._claims.try_claim(block.block_id, self._listing):
                self._of_others.append(number)
                self._next = -1
                continue
            self._left[number] = False
            self._next = number + 1
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
            self._kept.append((self._clock_s() + self.kept_s, block_id))
        else:
            self._claims.release(block_id)
        self._give_back()

    def wait(self) -> bool:
        """Nothing is free, and all that was taken here is done: look anew; whether there still is nothing to take."""
        self._give_back()
        self.look()
        return len(self) > 0 and not self._free.any()

    def look(self) -> None:
        """See what is claimed, then what is stored: so whatever is free by the listing is known if it is finished."""
        begun_s = self._clock_s()
        asked = self._chance.permutation(self._of_others)[:_ASKED_AFTER].astype(np.int64)
        self._listing = self._claims.look(self._blocks[number].block_id for number in asked)
        self._work.refresh()
        self._drop_finished()
        self._sort_out()
        now_s = self._clock_s()
        self._look_s = now_s - begun_s
        self._interval_s = max(LOOK_EVERY_S, self._look_s / SHARE)
        self._look_again_s = now_s + self._interval_s

    def _sort_out(self) -> None:
        """What is left is free, or of others."""
        held = self._held()
        self._of_others = [number for number in held if self._left[number]]
        self._free = self._left.copy()
        self._free[held] = False
        numbers = np.flatnonzero(self._free)
        self._chance.shuffle(numbers)
        classes = self._classes[numbers]
        self._anywhere = numbers[np.argsort(classes, kind="stable")].tolist()
        """Those that were free, in no order, but the large ones last: from there they are taken."""

    def _choose(self) -> int:
        """The number of a free block, one of the largest; -1: there is none."""
        while self._anywhere and not self._free[self._anywhere[-1]]:
            self._anywhere.pop()
        if not self._anywhere:
            return -1
        following = self._next if 0 <= self._next < len(self._blocks) and self._free[self._next] else -1
        same = following >= 0 and self._classes[following] == self._classes[self._anywhere[-1]]
        return following if same else self._anywhere[-1]

    def _give_back(self) -> None:
        while self._kept and self._kept[0][0] <= self._clock_s():
            self._claims.release(self._kept.popleft()[1])

    def _drop_finished(self) -> None:
        begins = np.cumsum(self._sizes) - self._sizes
        whole = np.logical_and.reduceat(self._work.finished(self._features), begins) & self._left
        self._left &= ~whole
        self._tell_finished(int(self._sizes[whole].sum()))

    def _somebody_has_ended(self) -> bool:
        """Whether a process that took part is gone from the claims, if it is time to list them.

        What they show to be held by now is not free. What they show to be free is so only from the next look on, which
        tells whether it was finished.
        """
        begun_s = self._clock_s()
        if begun_s < self._list_again_s:
            return False
        before, self._listing = self._listing, replace(self._claims.look(), dead=self._listing.dead)
        self._free[self._held()] = False
        now_s = self._clock_s()
        self._list_again_s = now_s + (now_s - begun_s) / SHARE
        return not before.marks <= self._listing.marks

    def _held(self) -> list[int]:
        """What others hold."""
        return [self._number_of[one] for one in self._listing.held if one in self._number_of]

    def _tell_finished(self, features: int) -> None:
        if features:
            self._on_finished(features)


def size_class(block: Block) -> int:
    """Of sizes that differ by less than two times."""
    return len(block.features).bit_length()

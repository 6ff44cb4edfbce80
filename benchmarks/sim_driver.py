"""How many actors one driver can keep at work: the real driver, on a clock of its own. For `sim_scale.py`.

What decides runs as it is: `precompute.driver.Driver` with `precompute.handout.Handout`. Simulated are the actors, by
the seconds that they encode and commit, and what the driver's own work takes: `SUBMIT_S` and `ANSWER_S` (about twice
what `bench_ray.py` finds), a call on the file server for each step of an append, and a look at the store now and then,
which stops the driver meanwhile.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

from vggt_cache.precompute.driver import Driver, Event, Report, Sayings
from vggt_cache.precompute.pipeline import Outcome
from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.todo import Seldom

SUBMIT_S, ANSWER_S = 2e-3, 1e-3
"""Of the driver: to hand out a block, to take in an answer."""
_TRIP_S = 1e-3
"""From the driver to an actor, or back."""
_APPEND_CALLS = 8
"""Two tables, each: open the folder, open the file, write, close."""
_SHARD_AGE_S = 60.0


class Actor:
    """Its own clock goes on from call to call, each of which waits for the one before."""

    def __init__(self, number: int, work: Any, storage: Any, store: Any) -> None:
        self.now_s = self.encoding_s = 0.0
        self._work, self._storage, self._store = work, storage, store
        self._seldom = Seldom(lambda: self.now_s)
        self._chance = random.Random(number)
        self._uncommitted: list[Block] = []
        self._open_lists, self._open_s = 0, 0.0
        self._committed: list[tuple[float, Block]] = []

    def compute(self, block: Block) -> list[Outcome]:
        self._seldom.do(self._look)
        sigma = self._work.spread
        seconds = len(block.features) * self._work.encode_s
        seconds *= self._chance.lognormvariate(-(sigma**2) / 2, sigma)
        if not self._open_lists:
            self._open_s = self.now_s
        self.now_s += seconds
        self.encoding_s += seconds
        self._uncommitted.append(block)
        self._open_lists += len(block.features)
        if self._open_lists >= self._work.shard_lists or self.now_s - self._open_s >= _SHARD_AGE_S:
            self._commit()
        return self._told()

    def flush(self) -> list[Outcome]:
        if self._uncommitted:
            self._commit()
        self.now_s = max([self.now_s, *(at_s for at_s, _ in self._committed)])
        return self._told()

    def _commit(self) -> None:
        at_s = self.now_s + self._storage.commit_s
        self._store.shards_s += [at_s] * -(-self._open_lists // self._work.shard_lists)
        self._committed += [(at_s, block) for block in self._uncommitted]
        self._uncommitted, self._open_lists = [], 0

    def _told(self) -> list[Outcome]:
        told = [block for at_s, block in self._committed if at_s <= self.now_s]
        self._committed = [one for one in self._committed if one[0] > self.now_s]
        for block in told:
            self._store.committed_s[block.features] = self.now_s
        return [Outcome(block_id=block.block_id, written=len(block.features)) for block in told]

    def _look(self) -> None:
        self.now_s += look_s(self._storage, self._store, self.now_s)


def look_s(storage: Any, store: Any, now_s: float) -> float:
    """Of taking in what is new in the store."""
    features = np.count_nonzero(store.committed_s <= now_s)
    new_shards = min(64, sum(at_s <= now_s for at_s in store.shards_s[-64:]))
    return float(storage.look_s + storage.million_s * features / 1e6 + storage.shard_s * new_shards)


class SimulatedCrew:
    """Answers come in the order of the clocks; waiting for one moves the driver's."""

    def __init__(self, actors: list[Actor], clock: Any) -> None:
        self._actors, self._clock = actors, clock
        self._answers: list[tuple[float, int, Event]] = []
        self._calls = 0

    def muster(self, ignored: Iterable[str]) -> int:
        if not self._calls:
            for worker in range(len(self._actors)):
                self._answer(worker, "begin", [])
        return len(self._actors)

    def compute(self, worker: int, task: Block) -> None:  # type: ignore[override]
        self._clock.spend(SUBMIT_S)
        self._arrive(worker)
        self._answer(worker, "compute", self._actors[worker].compute(task))

    def flush(self, worker: int) -> None:
        self._arrive(worker)
        self._answer(worker, "flush", self._actors[worker].flush())

    def stop(self, worker: int) -> None:
        raise AssertionError("nobody stops this run")

    def events(self, seconds: float) -> list[Event]:
        first_s = self._answers[0][0]
        self._clock.now_s = min(max(self._clock.now_s, first_s), self._clock.now_s + seconds)
        events = []
        while self._answers and self._answers[0][0] <= self._clock.now_s:
            events.append(heapq.heappop(self._answers)[2])
        self._clock.spend(ANSWER_S * len(events))
        return events

    def _arrive(self, worker: int) -> None:
        actor = self._actors[worker]
        actor.now_s = max(actor.now_s, self._clock() + _TRIP_S)

    def _answer(self, worker: int, call: Any, outcomes: list[Outcome]) -> None:
        self._calls += 1
        event = Event(worker=worker, call=call, report=Report(outcomes=outcomes))
        heapq.heappush(self._answers, (self._actors[worker].now_s + _TRIP_S, self._calls, event))


def drive(work: Any, count: int, storage: Any, store: Any, clock: Any) -> dict[str, float]:
    """The seconds that a run takes, and what of them was encoding."""
    blocks = work.blocks()
    actors = [Actor(number, work, storage, store) for number in range(count)]

    stored: Any = SimpleNamespace(
        known=SimpleNamespace(
            plan=SimpleNamespace(task_of=lambda block: block),
            learn=lambda frame, digest: None,
            table=SimpleNamespace(append=lambda rows: clock.spend(storage.call_s * _APPEND_CALLS)),
        ),
        same=SimpleNamespace(note=lambda pairs: None),
        cache=SimpleNamespace(
            spec=SimpleNamespace(context_rule=SimpleNamespace(noun="list")),
            refresh=lambda: None,
            save_index=lambda: None,
        ),
        ignored=(),
        refresh=lambda: clock.spend(look_s(storage, store, clock())),
    )
    bar = SimpleNamespace(total=0, update=lambda features: None)
    reporter: Any = SimpleNamespace(bar=lambda total, noun: nullcontext(bar))
    driver = Driver(
        SimulatedCrew(actors, clock), stored, reporter, StopRequest(), Sayings(reporter), clock_s=clock
    )
    tally = driver.compute(blocks)
    if tally.committed != work.lists:
        raise SystemExit(f"{tally.committed} of {work.lists} lists were computed: no result")
    encoding_s = sum(actor.encoding_s for actor in actors)
    return {"blocks": len(blocks), "wall_s": clock(), "encoding_s": encoding_s}

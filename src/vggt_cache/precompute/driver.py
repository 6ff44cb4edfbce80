"""The driver of a cluster's processes: it hands out blocks, takes in what became of them, and does all the telling.

It alone writes digests, failures and lines of output, and the progress bar moves at commits. A process that is lost
costs what it had not committed: others do that again. Of the engine it knows a `Crew` alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from vggt_cache.errors import EngineError
from vggt_cache.precompute.handout import MOST_ENDS, Handout
from vggt_cache.precompute.pipeline import Outcome, Tally
from vggt_cache.precompute.plan import Block, Task
from vggt_cache.precompute.report import Reporter, seconds_text
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored
from vggt_cache.precompute.todo import Seldom

SILENCE_S = 600.0
"""Nothing was heard of anybody for so long: that is told."""
_LOOK_S = 1.0
Said = tuple[str, tuple[str, ...]]
"""A method of Reporter, and what it is given."""


@dataclass(kw_only=True)
class Report:
    """What a process has to tell since its last report."""

    outcomes: list[Outcome] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """The answer to one call."""

    worker: int
    call: Literal["begin", "compute", "flush"]
    report: Report | None
    """None: the worker answers no other call either."""
    lost: str = ""
    """Why it has ended, where it has."""
    error: Exception | None = None
    """What it raised, where it did."""


class Crew(Protocol):
    """Workers, and calls to them, each of which is answered by an event later."""

    def muster(self, ignored: Iterable[str]) -> int:
        """See to it that as many as can work begin, each with a number of its own; returns how many are wanted."""

    def compute(self, worker: int, task: Task) -> None: ...
    def flush(self, worker: int) -> None: ...
    def stop(self, worker: int) -> None:
        """Let it compute no more. There is no answer."""

    def events(self, seconds: float) -> list[Event]:
        """What has come, or comes within so many seconds; errors last."""


class Sayings:
    """Lines of many processes: what several say alike is said once."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._said: set[Said] = set()

    def tell(self, said: Iterable[Said]) -> None:
        for one in said:
            if one not in self._said:
                self._said.add(one)
                how, words = one
                getattr(self._reporter, how)(*words)


class Driver:
    """One run's. `compute` may be called once."""

    def __init__(
        self,
        crew: Crew,
        stored: Stored,
        reporter: Reporter,
        stop: StopRequest,
        sayings: Sayings,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._crew, self._stored, self._reporter, self._stop = crew, stored, reporter, stop
        self._sayings, self._clock_s = sayings, clock_s
        self._plan = stored.known.plan
        self._tally = Tally()
        self._losses, self._lost = 0, ""
        """Since anything was saved; and why the last one."""
        self._flushing = Counter[int]()
        """By worker, how many flushes are not answered yet."""
        self._seldom = Seldom(clock_s)

    def compute(self, blocks: Sequence[Block]) -> Tally:
        """Returns when every feature of the blocks is stored or lost, or when asked to stop; all is committed then.

        Raises VggtCacheError; what was committed until then stays committed.
        """
        self._handout = Handout(blocks)
        total, noun = sum(len(block.features) for block in blocks), self._stored.cache.spec.context_rule.noun
        with self._reporter.bar(total, noun) as self._bar, self._stop.deferred():
            try:
                self._go_through()
            except Exception:
                self._commit_rest()
                raise
            if self._stop.requested:
                self._commit_rest()
        self._stored.cache.refresh()
        self._stored.cache.save_index()
        return self._tally

    def _go_through(self) -> None:
        self._heard_s, self._silent = self._clock_s(), False
        while not self._handout.is_finished and not self._stop.requested:
            self._wanted = self._crew.muster(self._stored.ignored)
            for worker in self._handout.workers:
                for block in self._handout.orders(worker):
                    if block is None:
                        self._flush(worker)
                    else:
                        self._crew.compute(worker, self._plan.task_of(block))
            if errors := self._take_in(self._crew.events(_LOOK_S)):
                raise errors[0]
            if self._losses >= MOST_ENDS * max(self._wanted, MOST_ENDS):
                raise EngineError(
                    f"{self._losses} processes of the cluster have ended one after another before anything was stored, "
                    f"the last one because {self._lost}: see Ray's logs there (/tmp/ray/session_latest/logs), and "
                    "whether memory and packages are the same on all machines"
                )
            self._seldom.do(self._stored.refresh)  # which keeps the index new for the others

    def _commit_rest(self) -> None:
        """Nobody computes any more, and what is finished is committed. Errors add nothing to why the run ends."""
        for worker in self._handout.workers:
            self._crew.stop(worker)
            self._flush(worker)
        while any(self._flushing[worker] for worker in self._handout.workers):
            self._take_in(self._crew.events(_LOOK_S))

    def _flush(self, worker: int) -> None:
        self._flushing[worker] += 1
        self._crew.flush(worker)

    def _take_in(self, events: Sequence[Event]) -> list[Exception]:
        for event in events:
            if event.error is not None:
                if event.worker in self._handout.workers:
                    self._handout.lost(event.worker)
                continue
            if event.report is None:
                self._lose(event)
                continue
            self._sayings.tell(event.report.said)
            if event.call == "begin":
                self._handout.join(event.worker)
            elif event.call == "compute":
                self._handout.computed(event.worker)
            else:
                self._flushing[event.worker] -= 1
            for outcome in event.report.outcomes:
                self._count(outcome)
                self._handout.saved(event.worker, outcome.block_id)
                self._losses = 0
        self._note([outcome for event in events if event.report for outcome in event.report.outcomes])
        self._watch_silence(bool(events))
        return [event.error for event in events if event.error is not None]

    def _note(self, outcomes: Sequence[Outcome]) -> None:
        """What was found out, of all that has come: a file server is asked once, however many there are."""
        known = self._stored.known
        for outcome in outcomes:
            for frame, (digest, _) in outcome.digests.items():
                known.learn(frame, digest)
        known.table.append(row for outcome in outcomes for row in outcome.rows)
        self._stored.same.note(pair for outcome in outcomes for pair in outcome.same)

    def _count(self, outcome: Outcome) -> None:
        self._tally.add(outcome)
        self._bar.total = (self._bar.total or 0) - outcome.elsewhere - len(outcome.lost)
        self._bar.update(outcome.written)

    def _lose(self, event: Event) -> None:
        """Others do again what it had not committed, but for a block with which one process after another ends."""
        self._losses, self._lost = self._losses + 1, event.lost
        if event.worker not in self._handout.workers:
            return
        self._reporter.warn(f"a process of the cluster is lost, and others go on with its work: {event.lost}")
        if (block := self._handout.lost(event.worker)) is not None:
            labels = [self._plan.label(feature) for feature in block.features.tolist()]
            for label in labels:
                self._reporter.failed(
                    label,
                    f"{MOST_ENDS} processes have ended while they computed the {len(labels)} lists that it is done "
                    "with: one of its images may be damaged, or memory too small",
                )
            self._count(Outcome(block_id=block.block_id, lost=labels))

    def _watch_silence(self, heard: bool) -> None:
        now_s = self._clock_s()
        if heard:
            self._heard_s, self._silent = now_s, False
        elif now_s - self._heard_s >= SILENCE_S and not self._silent:
            self._silent = True
            self._reporter.warn(
                f"nothing has moved for {seconds_text(now_s - self._heard_s)}: {len(self._handout.workers)} of "
                f"{self._wanted} processes have work, and a disk or a device of theirs may hang; the others wait for "
                "the cluster to have room, see ray status"
            )

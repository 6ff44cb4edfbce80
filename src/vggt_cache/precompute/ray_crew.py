"""A cluster's workers as Ray actors: calls to them, and what comes of them, as events."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vggt_cache.errors import EngineError
from vggt_cache.precompute.driver import Event, Report
from vggt_cache.precompute.handout import MOST_ENDS
from vggt_cache.precompute.plan import Task
from vggt_cache.precompute.ray_actor import EncodingProcess, Order

_BESIDE = "beside"
"""The second thread of an actor."""
_PATIENCE_S = 60.0


@dataclass
class _Call:
    worker: int
    name: Any


class RayCrew:
    """As many actors as are wanted: for each that is lost another one is asked for."""

    def __init__(
        self, ray: Any, order: Order, count: int, share: Mapping[str, float], warn: Callable[[str], object]
    ) -> None:
        """`share`: what each takes of the cluster, by Ray's names."""
        self._ray, self._order, self._count, self._warn = ray, order, count, warn
        made = ray.remote(concurrency_groups={_BESIDE: 1}, max_restarts=0, max_task_retries=0, **share)
        self._kind = made(EncodingProcess)
        self._actors: dict[int, Any] = {}
        self._calls: dict[Any, _Call] = {}
        self._begun: set[int] = set()
        self._next = 0
        self._fill()

    def muster(self, ignored: Iterable[str]) -> int:
        self._fill()
        for worker in self._actors.keys() - self._begun:
            self._begun.add(worker)
            self._call(worker, "begin", list(ignored))
        return self._count

    def compute(self, worker: int, task: Task) -> None:
        self._actors[worker].prepare.options(concurrency_group=_BESIDE).remote(task)
        self._call(worker, "compute")

    def flush(self, worker: int) -> None:
        self._call(worker, "flush")

    def stop(self, worker: int) -> None:
        self._actors[worker].stop.options(concurrency_group=_BESIDE).remote()

    def events(self, seconds: float) -> list[Event]:
        if not self._calls:
            return []
        ready, others = self._ray.wait(list(self._calls), timeout=seconds)
        if ready and others:
            ready += self._ray.wait(others, num_returns=len(others), timeout=0)[0]
        answers = [self._answer(call) for call in ready]
        events = [event for event in answers if event.report is not None]
        # Behind what the actors had told before they ended, of each its first end, and errors last.
        ends = {event.worker: event for event in reversed(answers) if event.report is None}
        for worker in ends:
            self._drop(worker)
        return events + sorted(ends.values(), key=lambda event: event.error is not None)

    def ask(self, call: str, *given: object) -> Report:
        """The answer of the first actor that is there. Raises what it raises."""
        reason = ""
        for _ in range(MOST_ENDS):
            worker = self._first()
            try:
                report: Report = self._ray.get(getattr(self._actors[worker], call).remote(*given))
            except self._ray.exceptions.RayTaskError as error:
                raise _cause_of(error) from error
            except self._ray.exceptions.RayError as error:
                reason = first_words(str(error))
                self._drop(worker)
            else:
                return report
        raise EngineError(
            f"{MOST_ENDS} processes of the cluster have ended before they had computed anything ({reason}): see "
            "Ray's logs there (/tmp/ray/session_latest/logs), and whether packages are the same on all machines"
        )

    def _first(self) -> int:
        """Waits until there is one."""
        self._fill()
        signs = {actor.__ray_ready__.remote(): worker for worker, actor in self._actors.items()}
        ready, _ = self._ray.wait(list(signs), timeout=_PATIENCE_S)
        if not ready:
            self._warn(
                "no process has begun: the cluster has no room for any, see ray status; waiting for it"
            )
            ready, _ = self._ray.wait(list(signs))
        return signs[ready[0]]

    def close(self) -> None:
        for worker in list(self._actors):
            self._drop(worker)

    def _fill(self) -> None:
        while len(self._actors) < self._count:
            self._actors[self._next] = self._kind.remote(self._order)
            self._next += 1

    def _call(self, worker: int, name: str, *given: object) -> None:
        self._calls[getattr(self._actors[worker], name).remote(*given)] = _Call(worker, name)

    def _answer(self, call: Any) -> Event:
        made, errors = self._calls.pop(call), self._ray.exceptions
        about: dict[str, Any] = {"worker": made.worker, "call": made.name}
        try:
            return Event(report=self._ray.get(call), **about)
        except errors.RayTaskError as error:
            return Event(report=None, error=_cause_of(error), **about)
        except errors.RayError as error:
            return Event(report=None, lost=first_words(str(error)), **about)

    def _drop(self, worker: int) -> None:
        """It may live still, where it cannot be reached, and must not go on then."""
        self._ray.kill(self._actors.pop(worker), no_restart=True)
        self._begun.discard(worker)
        self._calls = {call: made for call, made in self._calls.items() if made.worker != worker}


def _cause_of(error: Any) -> Exception:
    """What was raised in an actor, without the trace there, which the user need not see."""
    return error.cause if isinstance(error.cause, Exception) else error


def first_words(text: str) -> str:
    """What matters of Ray's messages: a sentence, after lines of names and numbers where there are any."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("\t")]
    return (
        lines[min(1, len(lines) - 1)].partition(". ")[0].rstrip(".")[:200] if lines else "it gives no reason"
    )

"""A thread that does what others hand to it, one job after the other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

Job = Callable[[], object]


class Worker:
    """A thread that does jobs in the order in which they come.

    It goes on after an error, whatever it is: nobody may wait for a thread that has gone. Jobs look at `error`.
    """

    def __init__(self, name: str, *, waiting: int, when_idle: Job = lambda: None) -> None:
        """At most `waiting` jobs wait; `when_idle` is done about once a second while none does."""
        self.error: BaseException | None = None
        """The first that a job, or waiting for one, has raised."""
        self._jobs: queue.Queue[Job | None] = queue.Queue(waiting)
        self.submit = self._jobs.put
        """Hand a job over; returns when there is a place for it."""
        self._when_idle = when_idle
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self, *, wait: bool = True) -> None:
        """Returns when all jobs are done and the thread has ended, or at once. May be called again."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while True:
            try:
                try:
                    job = self._jobs.get(timeout=1.0)
                except queue.Empty:
                    if self._closing and self._jobs.empty():  # the word to end was lost for want of memory
                        return
                    job = self._when_idle
                if job is None:
                    return
                job()
            except BaseException as error:  # also of the queue itself, which can run out of memory
                self.error = self.error or error

"""Several clients at once, of which exactly one runs at any time: which one, a seeded generator decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from random import Random

STUCK_S = 120.0


class Baton:
    """Runs bodies as threads that hand a baton to each other whenever one calls `switch`."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._waiting: dict[int, threading.Semaphore] = {}
        self._done = threading.Event()
        self._threads: dict[int, int] = {}
        self._failures: list[BaseException] = []

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run all of them to their ends; raises the first of the exceptions that any of them raised."""
        threads = []
        for number, body in enumerate(bodies):
            self._waiting[number] = threading.Semaphore(0)
            threads.append(threading.Thread(target=self._live, args=(number, body), daemon=True))
        for thread in threads:
            thread.start()
        self._pass_on()
        if not self._done.wait(STUCK_S):
            raise RuntimeError("the clients wait for each other")
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def switch(self) -> None:
        """Let another client run, perhaps. Does nothing outside of `run`."""
        me = self._threads.get(threading.get_ident())
        if me is None or self._random.random() < 0.4:
            return
        self._pass_on()
        self._waiting[me].acquire()

    def _pass_on(self) -> None:
        if self._waiting:
            self._waiting[self._random.choice(sorted(self._waiting))].release()
        else:
            self._done.set()

    def _live(self, number: int, body: Callable[[], None]) -> None:
        self._waiting[number].acquire()
        self._threads[threading.get_ident()] = number
        try:
            body()
        except BaseException as error:
            self._failures.append(error)
        finally:
            del self._threads[threading.get_ident()]
            del self._waiting[number]
            self._pass_on()

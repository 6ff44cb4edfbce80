"""Forked processes of trials: silent, bounded in memory where that is wanted, never waited for without end."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

STUCK_S = 120.0
"""A child that takes longer hangs: each of them has work for a few seconds."""
_SHOWN_CHARS = 4000
_HOARD: list[bytearray] = []


@dataclass(frozen=True, kw_only=True)
class End:
    """How a child ended."""

    status: int
    """Exit status, or minus the number of the signal that killed it."""
    said: str
    """What it wrote to stdout and stderr; at the end the traceback, if there was one."""
    peak_bytes: int
    """The largest memory that it had resident; at first that is the parent's."""


class Child:
    """A forked process that runs `body` and leaves with what it returns (None: 0), or with 1 after an exception.

    Signals have their defaults in it, whatever this process has made of them. It is ready for them when this
    returns.
    """

    def __init__(self, body: Callable[[], int | None], log: Path) -> None:
        self._log = log
        self._end: End | None = None
        log.touch()
        reading, ready = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            _live(body, log, ready)
        os.close(ready)
        os.read(reading, 1)
        os.close(reading)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.runs():
            os.kill(self.pid, signal.SIGKILL)
            self.end()

    def runs(self) -> bool:
        return self._end is None and not self._look(os.WNOHANG)

    def send(self, number: int) -> None:
        """A signal; nothing where the process has been waited for already."""
        if self._end is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it still runs."""
        until_s = time.monotonic() + seconds
        while self.runs() and time.monotonic() < until_s:
            time.sleep(min(0.001, max(0.0, until_s - time.monotonic())))
        return self.runs()

    def end(self) -> End:
        """Wait for the end. Raises AssertionError where it does not come."""
        if self.wait(STUCK_S):
            os.kill(self.pid, signal.SIGKILL)
            self._look(0)
            raise AssertionError(f"a process hangs: {self._said()[-_SHOWN_CHARS:]}")
        assert self._end is not None
        return self._end

    def well(self) -> End:
        """Wait for the end, which must be a good one."""
        end = self.end()
        assert end.status == 0, f"status {end.status}: {end.said[-_SHOWN_CHARS:]}"
        return end

    def _look(self, options: int) -> bool:
        """Whether it has ended."""
        found, status, usage = os.wait4(self.pid, options)
        if found:
            self._end = End(
                status=os.waitstatus_to_exitcode(status),
                said=self._said(),
                peak_bytes=usage.ru_maxrss * 1024,
            )
        return self._end is not None

    def _said(self) -> str:
        return self._log.read_text(errors="replace")


def limit_memory(more_bytes: int) -> None:
    """This process may have so much more address space than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most_bytes = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def exhaust_memory(spare_bytes: int) -> None:
    """This process has so much memory left and no more, whatever its allocators still had in store."""
    limit_memory(0)
    for block_bytes in (2**20, 2**16, 2**12):
        try:
            while True:
                _HOARD.append(bytearray(block_bytes))
        except MemoryError:
            continue
    freed = 0
    while _HOARD and freed < spare_bytes:
        freed += len(_HOARD.pop())


def _live(body: Callable[[], int | None], log: Path, ready: int) -> None:
    status = 1
    try:
        _become_silent(log)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.close(ready)
        status = body() or 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT  # as the interpreter does
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _become_silent(log: Path) -> None:
    # Appending: processes that this one leaves behind, such as multiprocessing's tracker, write to it too.
    file = log.open("a", buffering=1)
    for number in (1, 2):
        os.dup2(file.fileno(), number)
    sys.stdout = sys.stderr = file
    faulthandler.dump_traceback_later(0.9 * STUCK_S, file=file)

"""Work in processes of its own: a peer that crashes, hangs or does not clean up spoils nothing but its row."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

PRELOAD = ["torch", "torch.utils.data", "numpy", "vggt_cache.store", "vggt_cache.delivery"]
"""Loaded once, by the server that the rows are forked from; no peer is among them."""
PATIENCE_S = 10.0


class ChildError(Exception):
    """What became of a child that gave no result, in one sentence."""


def prepare() -> None:
    """To be called in a process that will have children of `forkserver`, each of which has a server of its own."""
    multiprocessing.set_forkserver_preload(PRELOAD)


class Child:
    """A process in a session of its own, which can be killed with all that it started."""

    def __init__(self, start_method: str, work: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context(start_method)
        self.messages, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(theirs, work, *arguments))
        with flushed():
            self._process.start()
        theirs.close()

    def kill(self) -> None:
        """SIGKILL, to it and its children, and wait until it is gone."""
        pid = self._process.pid
        assert pid is not None
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)

    def end(self, *, done: bool) -> None:
        """Let it end by itself where it is done; else ask it to end its own children and itself. Then make sure."""
        if done:
            self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(PATIENCE_S)
        self.kill()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode


def in_child(start_method: str, timeout_s: float | None, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(*arguments)` returns, from another process. Raises ChildError."""
    child = Child(start_method, _answer, work, *arguments)
    kind = None
    try:
        if not child.messages.poll(timeout_s):
            raise ChildError(f"no result after {timeout_s:.0f} s")
        kind, result = child.messages.recv()
    except EOFError:
        child.kill()
        raise ChildError(f"the process died: exit status {child.exit_code}") from None
    finally:
        child.end(done=kind is not None)
    if kind == "error":
        raise ChildError(result)
    return result


def in_one_line(error: BaseException) -> str:
    """Type and first words of an error, for a row of the result."""
    words = " ".join(str(error).split())[:160]
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


@contextlib.contextmanager
def flushed() -> Any:
    """A forked child must not print again what its parent has not printed yet."""
    sys.stdout.flush()
    sys.stderr.flush()
    yield


def _run(messages: Connection, work: Callable[..., Any], *arguments: Any) -> None:
    os.setsid()
    prepare()
    # "One thread" is to mean that, also where torch copies; and a pool of threads would not survive the next fork.
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that `finally` ends its children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells it
    work(messages, *arguments)


def _answer(messages: Connection, work: Callable[..., Any], *arguments: Any) -> None:
    try:
        messages.send(("result", work(*arguments)))
    except Exception as error:
        messages.send(("error", in_one_line(error)))

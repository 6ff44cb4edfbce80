"""A second process, which does with the same files what another process of a run would do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

from vggt_cache.errors import CacheAccessError
from vggt_cache.precompute.claims import Claims

POLL_S = 0.0005
SPAWN = multiprocessing.get_context("spawn")
_ANSWER_TIMEOUT_S = 60.0


class Partner:
    """Use as a context manager. Raises OSError where the process cannot be started, fails, or does not answer."""

    def __enter__(self) -> Partner:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def ask(self, do: Callable[..., Iterator[Any]], *arguments: Any) -> None:
        """Begin with one of this module's generators, whose values are the answers."""
        self._pipe.send((do, arguments))

    def answer(self) -> Any:
        """The next answer."""
        try:
            answer = (
                self._pipe.recv() if self._pipe.poll(_ANSWER_TIMEOUT_S) else OSError("it does not answer")
            )
        except EOFError:
            answer = OSError("it has died")
        if isinstance(answer, OSError):
            raise OSError(f"the second process: {answer.strerror or answer}")
        return answer


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    with suppress(EOFError):
        while True:
            do, arguments = pipe.recv()
            try:
                for answer in do(*arguments):
                    pipe.send(answer)
            except OSError as error:
                pipe.send(error)
            except CacheAccessError as error:
                pipe.send(OSError(str(error)))


def compete(folder: Path, blocks: list[str]) -> Iterator[Any]:
    """When the race for the blocks begins (time.monotonic()), then those that this process has won."""
    claims = Claims(folder)  # given back by nobody: a block that was free again would be won twice
    start_at_s = time.monotonic() + 0.05
    yield start_at_s
    yield won(claims, blocks, start_at_s)


def won(claims: Claims, blocks: list[str], start_at_s: float) -> list[str]:
    """The blocks that were claimed, from that moment on."""
    while time.monotonic() < start_at_s:
        pass
    return [block for block in blocks if claims.try_claim(block)]


def watch_names(folder: Path, ending: str, timeout_s: float) -> Iterator[Any]:
    """`ready`, then when (time.monotonic()) a name with this ending was first listed; None if it never was."""
    return _when(lambda: any(name.endswith(ending) for name in os.listdir(folder)), timeout_s)


def watch_content(path: Path, content: bytes, timeout_s: float) -> Iterator[Any]:
    """The same of this content of a file."""
    return _when(lambda: _read(path) == content, timeout_s)


def _when(is_seen: Callable[[], bool], timeout_s: float) -> Iterator[Any]:
    yield "ready"
    until_s = time.monotonic() + timeout_s
    while not is_seen():
        if time.monotonic() > until_s:
            yield None
            return
        time.sleep(POLL_S)
    yield time.monotonic()


def observe(path: Path, contents: list[bytes], duration_s: float) -> Iterator[Any]:
    """`ready`, then how often the file was whole, absent, or none of the contents, read again and again."""
    yield "ready"
    counts = {"whole": 0, "absent": 0, "torn": 0}
    until_s = time.monotonic() + duration_s
    while time.monotonic() < until_s:
        data = _read(path)
        counts["absent" if data is None else "whole" if data in contents else "torn"] += 1
    yield counts


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None

"""The second process of the doctor: it does with the same files what another process of a run would do.

Run as a file, so that it imports nothing but the standard library and starts quickly. It reads one JSON
request a line and answers each with one or two JSON lines.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

POLL_S = 0.0005
Answers = Iterator[dict[str, Any]]


def race(paths: list[str], start_at_s: float) -> list[str]:
    """Create each file exclusively, from a moment on (time.monotonic()) that all competitors were told.

    Returns the paths that did not exist before: the ones that were won.
    """
    won = []
    while time.monotonic() < start_at_s:
        pass
    for path in paths:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            won.append(path)
        except FileExistsError:
            continue
    return won


def _race(paths: list[str], start_at_s: float) -> Answers:
    yield {"won": race(paths, start_at_s)}


def _watch(path: str, content: str, timeout_s: float) -> Answers:
    """When (time.monotonic()) the file first had this content; None if it never did."""
    yield {"ready": True}
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if _read(path) == content.encode():
            yield {"seen_at_s": time.monotonic()}
            return
        time.sleep(POLL_S)
    yield {"seen_at_s": None}


def _observe(path: str, contents: list[str], duration_s: float) -> Answers:
    """Read again and again: how often the file was whole, absent, or none of the contents."""
    yield {"ready": True}
    whole = absent = torn = 0
    accepted = {content.encode() for content in contents}
    until = time.monotonic() + duration_s
    while time.monotonic() < until:
        data = _read(path)
        whole, absent, torn = (
            whole + (data in accepted),
            absent + (data is None),
            torn + (data not in accepted),
        )
    yield {"whole": whole, "absent": absent, "torn": torn - absent}


def _read(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        return None


_COMMANDS: dict[str, Callable[..., Answers]] = {"race": _race, "watch": _watch, "observe": _observe}


def main() -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        try:
            for answer in _COMMANDS[request.pop("do")](**request):
                print(json.dumps(answer), flush=True)
        except OSError as error:
            print(json.dumps({"error": error.strerror or str(error)}), flush=True)


if __name__ == "__main__":
    main()

"""Figures on disk the moment they are known: one line of JSON each, so that a step that is killed keeps what it found.

    {"step": "frame", "name": "518_batch_16", "value": {"frames_per_s": 215.0, ...}}
    {"step": "frame", "name": "644_batch_16", "error": "OutOfMemoryError: ..."}
    {"step": "frame", "ended": 0, "took_s": 41.2}                                       by the parent; "ended": null
                                                                                        was killed at its limit

A step's name comes again where it was repeated; the later figures count.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")
FILE = "figures.jsonl"


class Notes:
    """What one step has found so far."""

    def __init__(self, out: Path, step: str) -> None:
        self._out = out
        self._step = step
        self.failed = 0
        """Measurements that raised."""

    def tell(self, name: str, value: object) -> None:
        """`value` is anything that JSON can hold."""
        append(self._out, {"step": self._step, "name": name, "value": value})

    def measure(self, name: str, work: Callable[[], Found]) -> Found | None:
        """Tell what `work` returns and return it; None where it failed, which costs this figure only."""
        with self.expecting(name):
            value = work()
            self.tell(name, value)
            return value
        return None

    @contextmanager
    def expecting(self, name: str) -> Iterator[None]:
        """An error inside is told, and goes no further."""
        try:
            yield
        except Exception as error:  # whatever it is, the other figures are still wanted
            traceback.print_exc()
            self.failed += 1
            message = f"{type(error).__name__}: {str(error)[:400]}"
            append(self._out, {"step": self._step, "name": name, "error": message})


def append(out: Path, line: dict[str, Any]) -> None:
    """One write for the whole line: what was told before a kill is whole."""
    data = (json.dumps(line) + "\n").encode()
    file = os.open(out / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(file, data)
    finally:
        os.close(file)
    print(data.decode()[:1000], end="", file=sys.stderr, flush=True)


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Figures by step and name, of a folder or of its file. Those that failed are left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines(path):
        if "value" in line:
            found.setdefault(line["step"], {})[line["name"]] = line["value"]
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    """All that was told, in order."""
    file = path / FILE if path.is_dir() else path
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

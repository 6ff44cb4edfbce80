"""Three ways to show how a run goes on: lines in a pipe, JSON, a live table on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from vggt_cache.monitor.render import Look, json_line, plain_line


@contextmanager
def display(*, json: bool) -> Iterator[Callable[[Look], None]]:
    """What shows one look after the other, as fits where the output goes."""
    if json:
        yield lambda look: print(json_line(look), flush=True)  # each time it reads the log, news or not
    elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from rich.live import Live  # not needed in a pipe, and slow to import

        from vggt_cache.monitor.table import table_of

        with Live(auto_refresh=False) as live:
            yield lambda look: live.update(table_of(look), refresh=True)
    else:
        yield _NewLines().show


class _NewLines:
    """A line for each look at which there was a new step; warnings and notes when they come up."""

    def __init__(self) -> None:
        self._shown: tuple[str | None, int | None] = (None, None)
        self._said: set[str] = set()

    def show(self, look: Look) -> None:
        step = (look.progress.log, look.progress.step)
        if look.progress.step is not None and step != self._shown:
            self._shown = step
            print(plain_line(look.progress, look.gpus), flush=True)
        current = {alarm.kind: f"[WARN] {alarm.text}" for alarm in look.alarms}
        current |= {note: f"[INFO] {note}" for note in look.notes}
        for subject, line in current.items():
            if subject not in self._said:
                print(line, flush=True)
        self._said = set(current)

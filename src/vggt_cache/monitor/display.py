"""Three ways to show how a run goes on: lines in a pipe, JSON, a live table on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vggt_cache.monitor.alarms import Alarm
from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.render import json_line, plain_line
from vggt_cache.monitor.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class View:
    """All that is to be shown at one moment."""

    snapshot: Snapshot
    alarms: Sequence[Alarm]
    gpus: Sequence[Gpu]
    notes: Sequence[str]
    """What is no fault but good to know, such as that there is no log yet."""
    now_s: float


class Display(Protocol):
    """Shows one view after the other. `close` is called once, at the end."""

    def show(self, view: View) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """A line for each look at which there was a new step; warnings and notes when they come up."""

    def __init__(self) -> None:
        self._shown: tuple[str | None, int | None] = (None, None)
        self._said: set[str] = set()

    def show(self, view: View) -> None:
        step = (view.snapshot.log, view.snapshot.step)
        if view.snapshot.step is not None and step != self._shown:
            self._shown = step
            print(plain_line(view.snapshot, view.gpus), flush=True)
        current = {alarm.kind: f"[WARN] {alarm.text}" for alarm in view.alarms}
        current |= {note: f"[INFO] {note}" for note in view.notes}
        for subject, line in current.items():
            if subject not in self._said:
                print(line, flush=True)
        self._said = set(current)

    def close(self) -> None:
        pass


class JsonDisplay:
    """One object on one line at each look, news or not."""

    def show(self, view: View) -> None:
        print(json_line(view.snapshot, view.alarms, view.gpus, view.now_s), flush=True)

    def close(self) -> None:
        pass


class TableDisplay:
    """A table that is drawn over at each look."""

    def __init__(self) -> None:
        from rich.live import Live  # not needed in a pipe, and slow to import

        self._live = Live(auto_refresh=False)
        self._live.start()

    def show(self, view: View) -> None:
        from vggt_cache.monitor.table import table_of

        table = table_of(view.snapshot, view.alarms, view.gpus, view.notes, view.now_s)
        self._live.update(table, refresh=True)

    def close(self) -> None:
        self._live.stop()

"""Three ways to show how a run goes on: lines in a pipe, JSON, a live table on a terminal."""

from __future__ import annotations

from typing import Protocol

from vggt_cache.monitor.render import Look, json_line, plain_line


class Display(Protocol):
    """Shows one look after the other. `close` is called once, at the end."""

    def show(self, look: Look) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
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

    def close(self) -> None:
        pass


class JsonDisplay:
    """One object on one line at each look, news or not."""

    def show(self, look: Look) -> None:
        print(json_line(look), flush=True)

    def close(self) -> None:
        pass


class TableDisplay:
    """A table that is drawn over at each look."""

    def __init__(self) -> None:
        from rich.live import Live  # not needed in a pipe, and slow to import

        self._live = Live(auto_refresh=False)
        self._live.start()

    def show(self, look: Look) -> None:
        from vggt_cache.monitor.table import table_of

        self._live.update(table_of(look), refresh=True)

    def close(self) -> None:
        self._live.stop()

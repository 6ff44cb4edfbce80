"""The command: look, show, wait, look again. Shown are lines in a pipe, JSON, or a live table on a terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

from vggt_cache.errors import SettingsError
from vggt_cache.monitor import MonitorSettings
from vggt_cache.monitor.gpu import GpuReader
from vggt_cache.monitor.logs import IN_A_DIRECTORY, LogSet
from vggt_cache.monitor.progress import Progress, alarms_of
from vggt_cache.monitor.render import Look, json_line, plain_line, table_of
from vggt_cache.precompute.report import seconds_text


def monitor(
    settings: MonitorSettings,
    *,
    clock: Callable[[], float] = time.time,
    wait: Callable[[float], None] = time.sleep,
) -> int:
    """Show how training goes on, until Ctrl-C, which is the way to leave and no fault; returns the exit code.

    With `once`: 0, or 1 where something deserves attention. Raises SettingsError where no log can be read, and
    with `once` where there is none; without it, a log is waited for.
    """
    gpus = GpuReader()
    with closing(LogSet(settings.logs)) as logs:
        if settings.once:
            look = _look(settings, logs, gpus, clock())
            if look.progress.log is None:
                raise SettingsError(
                    f"no log matches {', '.join(settings.logs)}, so there is nothing to show: give a log file, a "
                    f"pattern, or a directory with {' or '.join(IN_A_DIRECTORY)} in it"
                )
            with _display(json=settings.json) as show:
                show(look)
            return int(bool(look.alarms))
        with suppress(KeyboardInterrupt), _display(json=settings.json) as show:
            while True:
                show(_look(settings, logs, gpus, clock()))
                wait(settings.interval)
        return 0


def _look(settings: MonitorSettings, logs: LogSet, gpus: GpuReader, now_s: float) -> Look:
    logs.refresh(now_s)
    progress = logs.progress(settings.samples_per_step)
    alarms = tuple(alarms_of(progress, settings, now_s))
    if any(alarm.kind == "stall" for alarm in alarms):
        progress = replace(progress, left_s=None)  # no time is left over for a run that does not go on
    notes = tuple(_notes(settings, progress))
    return Look(progress=progress, alarms=alarms, gpus=gpus.read(), notes=notes, now_s=now_s)


def _notes(settings: MonitorSettings, progress: Progress) -> Iterator[str]:
    if progress.log is None:
        yield f"Waiting for a log: nothing matches {', '.join(settings.logs)} yet"
    elif progress.log_bytes == 0:
        yield f"There is nothing in {progress.log} yet: it is empty"
    elif progress.step is None:
        yield f"There is no training step in {progress.log} yet"
    if progress.ended:
        took = progress.train_runtime_s
        yield f"The run has ended{'' if took is None else f' after {seconds_text(took)}'}: {progress.log}"


@contextmanager
def _display(*, json: bool) -> Iterator[Callable[[Look], None]]:
    """What shows one look after the other, as fits where the output goes."""
    if json:
        yield lambda look: print(json_line(look), flush=True)  # each time it reads the log, news or not
    elif sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from rich.live import Live  # not needed in a pipe, and slow to import

        with Live(auto_refresh=False) as live:
            yield lambda look: live.update(table_of(look), refresh=True)
    else:
        yield _NewLines().show


class _NewLines:
    """Warnings and notes when they come up; then a line, where there was a new step."""

    def __init__(self) -> None:
        self._shown: tuple[str | None, int | None] = (None, None)
        self._said: set[str] = set()

    def show(self, look: Look) -> None:
        current = {alarm.kind: f"[WARN] {alarm.text}" for alarm in look.alarms}
        current |= {note: f"[INFO] {note}" for note in look.notes}
        for subject, line in current.items():
            if subject not in self._said:
                print(line, flush=True)
        self._said = set(current)
        step = (look.progress.log, look.progress.step)
        if look.progress.step is not None and step != self._shown:
            self._shown = step
            print(plain_line(look.progress, look.gpus), flush=True)

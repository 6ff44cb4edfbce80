"""The command: look, show, wait, look again."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NoReturn

from vggt_cache.errors import SettingsError
from vggt_cache.monitor.alarms import alarms_of
from vggt_cache.monitor.display import Display, JsonDisplay, PlainDisplay, TableDisplay
from vggt_cache.monitor.gpu import GpuReader
from vggt_cache.monitor.logs import IN_A_DIRECTORY, LogSet
from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.render import Look
from vggt_cache.monitor.settings import MonitorSettings
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
    with LogSet(settings.logs) as logs:
        if settings.once:
            return _look_once(settings, logs, clock)
        display = _display(settings)
        try:
            _follow(settings, logs, display, clock, wait)
        except KeyboardInterrupt:
            return 0
        finally:
            display.close()


def _look_once(settings: MonitorSettings, logs: LogSet, clock: Callable[[], float]) -> int:
    look = _look(settings, logs, GpuReader(), clock())
    if look.progress.log is None:
        raise SettingsError(
            f"no log matches {_names(settings)}, so there is nothing to show: give a log file, a pattern, or a "
            f"directory with {' or '.join(IN_A_DIRECTORY)} in it"
        )
    display = _display(settings)
    try:
        display.show(look)
    finally:
        display.close()
    return int(bool(look.alarms))


def _follow(
    settings: MonitorSettings,
    logs: LogSet,
    display: Display,
    clock: Callable[[], float],
    wait: Callable[[float], None],
) -> NoReturn:
    gpus = GpuReader()
    while True:
        display.show(_look(settings, logs, gpus, clock()))
        wait(settings.interval)


def _look(settings: MonitorSettings, logs: LogSet, gpus: GpuReader, now_s: float) -> Look:
    logs.refresh(now_s)
    progress = logs.progress(settings.samples_per_step)
    return Look(
        progress=progress,
        alarms=alarms_of(progress, settings, now_s),
        gpus=gpus.read(),
        notes=tuple(_notes(settings, progress)),
        now_s=now_s,
    )


def _display(settings: MonitorSettings) -> Display:
    if settings.json:
        return JsonDisplay()
    if sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return TableDisplay()
    return PlainDisplay()


def _notes(settings: MonitorSettings, progress: Progress) -> Iterator[str]:
    if progress.log is None:
        yield f"Waiting for a log: nothing matches {_names(settings)} yet"
    elif progress.log_bytes == 0:
        yield f"There is nothing in {progress.log} yet: it is empty"
    elif progress.step is None:
        yield f"There is no training step in {progress.log} yet"
    if progress.ended:
        yield f"The run has ended{_after(progress)}: {progress.log}"


def _after(progress: Progress) -> str:
    return f" after {seconds_text(progress.train_runtime_s)}" if progress.train_runtime_s is not None else ""


def _names(settings: MonitorSettings) -> str:
    return ", ".join(settings.logs)

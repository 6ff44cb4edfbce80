"""The command: look, show, wait, look again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from vggt_cache.errors import SettingsError
from vggt_cache.monitor.alarms import alarms_of
from vggt_cache.monitor.display import display
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
    gpus = GpuReader()
    with LogSet(settings.logs) as logs:
        if settings.once:
            look = _look(settings, logs, gpus, clock())
            if look.progress.log is None:
                raise SettingsError(
                    f"no log matches {', '.join(settings.logs)}, so there is nothing to show: give a log file, a "
                    f"pattern, or a directory with {' or '.join(IN_A_DIRECTORY)} in it"
                )
            with display(json=settings.json) as show:
                show(look)
            return int(bool(look.alarms))
        with suppress(KeyboardInterrupt), display(json=settings.json) as show:
            while True:
                show(_look(settings, logs, gpus, clock()))
                wait(settings.interval)
        return 0


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


def _notes(settings: MonitorSettings, progress: Progress) -> Iterator[str]:
    if progress.log is None:
        yield f"Waiting for a log: nothing matches {', '.join(settings.logs)} yet"
    elif progress.log_bytes == 0:
        yield f"There is nothing in {progress.log} yet: it is empty"
    elif progress.step is None:
        yield f"There is no training step in {progress.log} yet"
    if progress.ended:
        took = (
            f" after {seconds_text(progress.train_runtime_s)}" if progress.train_runtime_s is not None else ""
        )
        yield f"The run has ended{took}: {progress.log}"

"""Which logs are meant, and which of them tells of the run that is going on."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import replace

from vggt_cache.errors import SettingsError
from vggt_cache.monitor.parse import bars_in
from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.state import RECENT_STEPS, TrainingState
from vggt_cache.monitor.tail import Tail

MOST_LOGS = 16
"""Of many logs only the newest are looked at."""
IN_A_DIRECTORY = ("*.log", "*.out")
_LINES_OF_METRICS = 3


def found_logs(patterns: Iterable[str]) -> list[str]:
    """The regular files that names, glob patterns and directories stand for; the newest last, at most MOST_LOGS.

    Raises SettingsError for a name of something that is no file and no directory.
    """
    times: dict[str, float] = {}
    for pattern in patterns:
        for path in _matches(os.path.expanduser(pattern)):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                continue  # gone since it was listed
            except OSError as error:
                raise _unreadable(path, error) from error
            if stat.S_ISREG(status.st_mode):
                times[path] = status.st_mtime
            elif path == pattern:
                raise SettingsError(
                    f"{path} is not a regular file, so there is no end to read: give a log file"
                )
    return sorted(times, key=lambda path: (times[path], path))[-MOST_LOGS:]


def _matches(pattern: str) -> list[str]:
    if os.path.isdir(pattern):
        places = [os.path.join(glob.escape(pattern), ending) for ending in IN_A_DIRECTORY]
        return [path for place in places for path in glob.glob(place)]
    # Brackets and stars may be part of a name.
    return [pattern] if os.path.lexists(pattern) else glob.glob(pattern, recursive=True)


class WatchedLog:
    """One log and what it says. Raises OSError where the file cannot be read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.tail = Tail(path, _tells_enough)
        self.state = TrainingState()
        self._seen = False

    def refresh(self, now_s: float) -> None:
        """Take in what is new; at first everything there is, dated by the file's modification time."""
        at_s = now_s if self._seen else min(now_s, self.tail.modified_at_s)
        for piece in self.tail.new_pieces():
            self.state.read(piece, at_s)
        for bar in bars_in(self.tail.unfinished):
            self.state.fold(bar, at_s)
        self._seen = True

    def progress(self, samples_per_step: int | None) -> Progress:
        known = self.state.progress(samples_per_step)
        return replace(known, log=self.path, log_bytes=self.tail.size, modified_at_s=self.tail.modified_at_s)


def _tells_enough(pieces: Iterator[bytes]) -> bool:
    """Whether the end of a log holds the recent speed and some lines of metrics."""
    state = TrainingState()
    lines = 0
    for piece in pieces:
        state.read(piece, 0.0)
        lines += b"'loss'" in piece
    run = state.training
    return run is not None and run.last.step - run.first.step >= RECENT_STEPS and lines >= _LINES_OF_METRICS


class LogSet:
    """All logs that are meant, read again at each refresh; new ones that match are taken in. Close it when done."""

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = patterns
        self._watched: dict[str, WatchedLog] = {}

    def close(self) -> None:
        for path in list(self._watched):
            self._drop(path)

    def refresh(self, now_s: float) -> None:
        """Read what is new. Raises SettingsError where none of the logs can be read."""
        refusal: SettingsError | None = None
        paths = found_logs(self._patterns)
        for path in paths:
            try:
                if path not in self._watched:
                    self._watched[path] = WatchedLog(path)
                self._watched[path].refresh(now_s)
            except OSError as error:
                refusal = _unreadable(path, error)
                self._drop(path)
        for path in set(self._watched) - set(paths):
            if os.path.exists(path):  # not among the newest any more; one that was removed is still shown
                self._drop(path)
        if refusal and not self._watched:
            raise refusal

    def _drop(self, path: str) -> None:
        if watched := self._watched.pop(path, None):
            watched.tail.close()

    def progress(self, samples_per_step: int | None) -> Progress:
        """The run whose bar moved last, or before any has, the newest log; with an error of another node."""
        if not self._watched:
            return Progress()
        logs = self._watched.values()
        shown = max(logs, key=lambda log: (log.state.progress_at_s or 0.0, log.tail.modified_at_s, log.path))
        known = shown.progress(samples_per_step)
        for log in () if known.failure else logs:
            failure, since_s = log.state.lines.failure, shown.state.progress_at_s or 0.0
            # Another node's log has no bar, and was written after the last step of the one shown.
            if failure and log.state.progress_at_s is None and log.tail.modified_at_s >= since_s:
                return replace(known, failure=f"{failure} ({log.path})")
        return known


def _unreadable(path: str, error: OSError) -> SettingsError:
    return SettingsError(
        f"{path} cannot be read ({error.strerror or error}), so nothing of it can be shown: check its permissions"
    )

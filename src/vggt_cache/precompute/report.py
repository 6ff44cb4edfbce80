"""What a run tells its user: the guide's lines on stdout, the progress bar on stderr, and the inputs it could not use.

A bad input costs one warning and one line of `failures.jsonl` in the cache directory; the run goes on. That file is a
log: lines are only appended, by every process with one write each, and an entry that stands there is not repeated. What
a later run of the same data has mended gets a line whose `reason` is null: the last line of `of` and `path` counts.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from vggt_cache.environment import rank_of
from vggt_cache.errors import SmallFileError
from vggt_cache.output import json_line, name_text
from vggt_cache.small_files import SmallFolder
from vggt_cache.store.object_folder import folder_at

EXIT_OK, EXIT_INVALID, EXIT_INCOMPLETE = 0, 1, 3
"""All is well; verification found fault; some inputs could not be used (they stand in failures.jsonl)."""
FAILURES_FILE = "failures.jsonl"
_MAX_BYTES = 64 * 2**20
"""Of the list of earlier runs; a longer one is not looked at, and entries may stand there twice."""
_MAX_SHOWN = 100


class Reporter:
    """Prints `[INFO]`, `[WARN]` and `[SUCCESS]` lines without tearing the progress bar.

    Under a launcher that sets RANK, `info` is printed by rank 0 alone; warnings and results by every rank.
    """

    def __init__(self) -> None:
        """Raises SettingsError where the environment's numbers are none."""
        self.rank = rank_of("RANK", 0)
        self.world_size = rank_of("WORLD_SIZE", 1)
        self.failures: set[str] = set()
        """What could not be used: a file, `annotation:line`, or a feature's label."""
        self._remarks: set[str] = set()
        self._folder: SmallFolder | None = None
        self._listed: dict[tuple[str, str], str] = {}
        self._of = ""

    def info(self, text: str) -> None:
        if self.rank == 0:
            self._line("INFO", text)

    def warn(self, text: str) -> None:
        self._line("WARN", text)

    def remark(self, path: str, text: str) -> None:
        """Warn of what many inputs may have, and none of them fails for: once a run, with the first."""
        if text not in self._remarks:
            self._remarks.add(text)
            self.warn(f"{text} (the first: {path!r})")

    def warn_of(self, number: int, text: str, rest: str) -> None:
        """The `number`-th line of its kind, counted from 1. Only the first are shown; `rest`: what of the others."""
        if number <= _MAX_SHOWN:
            self.warn(text)
        elif number == _MAX_SHOWN + 1:
            self.warn(f"more than {_MAX_SHOWN} such lines: {rest}")

    def success(self, text: str) -> None:
        self._line("SUCCESS", text)

    def _line(self, level: str, text: str) -> None:
        mark = f" [rank {self.rank}]" if self.world_size > 1 and self.rank else ""
        with tqdm.external_write_mode(file=sys.stdout):
            print(f"[{level}]{mark} {text}", flush=True)

    def bar(self, total: int, unit: str) -> tqdm[Any]:
        """The `Processing` bar; redrawn rarely where nobody watches, so that logs stay short."""
        name = f"Processing (rank {self.rank})" if self.world_size > 1 else "Processing"
        seconds = 0.2 if sys.stderr.isatty() else 5.0
        return tqdm(
            total=total, desc=name, unit=unit, mininterval=seconds, maxinterval=30.0, dynamic_ncols=True
        )

    def list_failures(self, cache_dir: str, of: str = "") -> None:
        """From now on they are written down in this cache directory, not only shown. `of`: data and specification."""
        self._folder, self._of = folder_at(cache_dir, may_be_link=True), of
        self._listed = standing_failures(cache_dir)

    @property
    def lists_failures(self) -> bool:
        return self._folder is not None

    def earlier_failures(self) -> list[str]:
        """What stands in the list for this data, and has not failed in this run."""
        return [path for of, path in self._listed if of == self._of and path not in self.failures]

    def mended(self, paths: Iterable[str]) -> None:
        """They can be used by now: take them from the list."""
        for path in paths:
            self._write_down(path, None)

    def failed(self, path: str, reason: str) -> None:
        """`path` (a file, or what else `failures` names) cannot be used. The first reason stands."""
        if path in self.failures:
            return
        self.failures.add(path)
        rest = f"all of them are listed in {self._folder.of(FAILURES_FILE)}" if self._folder else ""
        self.warn_of(len(self.failures), f"{name_text(path)}: {reason}", rest or "the others are not shown")
        if self._listed.get((self._of, path)) != reason:
            self._write_down(path, reason)

    def _write_down(self, path: str, reason: str | None) -> None:
        if self._folder:
            entry = {
                "path": path,
                "reason": reason,
                "of": self._of,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            try:
                self._folder.append(FAILURES_FILE, json_line(entry))
            except SmallFileError as error:
                self._folder = None
                self.warn(f"{error}; failures are only shown here")


def standing_failures(cache_dir: str) -> dict[tuple[str, str], str]:
    """What is listed and not mended: by `of` and path the reason."""
    standing: dict[tuple[str, str], str] = {}
    with suppress(SmallFileError):
        folder = folder_at(cache_dir, may_be_link=True)
        for line in folder.read(FAILURES_FILE, _MAX_BYTES).splitlines():
            with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):  # torn by a crash
                entry = json.loads(line)
                key = str(entry.get("of", "")), str(entry["path"])
                standing.pop(key, None)
                if isinstance(entry["reason"], str):
                    standing[key] = entry["reason"]
    return standing


def print_first(lines: Sequence[str]) -> None:
    """On stdout the first of many lines of one kind, and one that counts the others."""
    for line in lines[:_MAX_SHOWN]:
        print(line)
    if len(lines) > _MAX_SHOWN:
        print(f"and {len(lines) - _MAX_SHOWN} more")


def count_of(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def bytes_text(count: float) -> str:
    """A size in the unit that suits it: `512 B`, `3.4 MiB`, `1.2 TiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A duration in words: `42 s`, `3 min 10 s`, `2 h 30 min`, `5 d 3 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"

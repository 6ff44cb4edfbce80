"""The list of inputs that a run could not use: `failures.jsonl` in the cache directory.

A bad input costs one warning and one line here; the run goes on. The file is a log: lines are only
appended, by every process with one write each, and an entry that stands there already is not repeated.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from vggt_cache.errors import SmallFileError
from vggt_cache.precompute.report import Reporter
from vggt_cache.small_files import SmallFolder

FILE_NAME = "failures.jsonl"
_MAX_BYTES = 64 * 2**20
"""Of the list of earlier runs; a longer one is not looked at, and entries may stand there twice."""
_MAX_SHOWN = 100


class FailureLog:
    """Counts, shows and writes down what failed. `count` is the number of distinct inputs of this run."""

    def __init__(self, cache_dir: str, reporter: Reporter, *, write: bool = True) -> None:
        self.path = Path(cache_dir) / FILE_NAME
        self._folder = SmallFolder(cache_dir, may_be_link=True)
        self._reporter = reporter
        self._write = write
        self._listed = self._read_listed() if write else set()
        self._seen: set[str] = set()

    @property
    def count(self) -> int:
        return len(self._seen)

    def __contains__(self, path: str) -> bool:
        return path in self._seen

    def add(self, path: str, reason: str) -> None:
        """Record that `path` (a file, or `annotation:line`) cannot be used. The first reason stands."""
        if path in self._seen:
            return
        self._seen.add(path)
        if self.count <= _MAX_SHOWN:
            self._reporter.warn(f"{path}: {reason}")
        elif self.count == _MAX_SHOWN + 1:
            self._reporter.warn(
                f"more than {_MAX_SHOWN} inputs failed; all of them are listed in {self.path}"
            )
        if self._write and (path, reason) not in self._listed:
            self._append(path, reason)

    def _append(self, path: str, reason: str) -> None:
        line = json.dumps({"path": path, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        try:
            self._folder.append(FILE_NAME, line.encode() + b"\n")
        except SmallFileError as error:
            self._write = False
            self._reporter.warn(f"{error}; failures are only shown here")

    def _read_listed(self) -> set[tuple[str, str]]:
        listed = set()
        try:
            lines = self._folder.read(FILE_NAME, _MAX_BYTES).splitlines()
        except SmallFileError:
            lines = []
        for line in lines:
            try:
                entry = json.loads(line)
                listed.add((entry["path"], entry["reason"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue  # a line torn by a crash says nothing
        return listed

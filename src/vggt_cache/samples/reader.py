"""All samples of a data root, one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from vggt_cache.samples.annotations import (
    Entry,
    iter_json_lines,
    iter_json_list,
    parse_item,
    parse_line,
)
from vggt_cache.samples.episodes import iter_episode
from vggt_cache.samples.paths import tidy
from vggt_cache.samples.sample import (
    Problem,
    Sample,
    UnusableSampleError,
    checked_name,
    frame_names,
    layout_of,
)
from vggt_cache.samples.sources import Sources, open_samples


def iter_samples(sources: Sources, *, on_problem: Callable[[Problem], None]) -> Iterator[Sample]:
    """Samples in a fixed order: JSON Lines files, JSON lists, episode folders, each sorted by path.

    What cannot be used is told to `on_problem`, and the rest is read. Samples without frames come too.
    Memory does not grow with the number of samples.
    """
    for problem in sources.problems:
        on_problem(problem)
    for path in sources.files:
        for _, sample in iter_file(path, sources.folder_of(path), on_problem):
            yield sample
    for folder in sources.episode_dirs:
        yield from iter_episode(folder, on_problem)


def iter_file(
    path: str, folder: str, on_problem: Callable[[Problem], None]
) -> Iterator[tuple[Entry, Sample]]:
    """The samples of one annotation file with their places; relative names belong below `folder`."""
    bases = _Bases(folder, path)
    number = 0
    try:
        with open_samples(path) as file:
            entries = iter_json_lines(file) if _has_lines(path) else iter_json_list(file)
            for entry in entries:
                number = entry.number
                try:
                    yield entry, _sample(entry, path, bases)
                except UnusableSampleError as error:
                    on_problem(Problem(path=path, line=number, reason=str(error)))
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}), nor what follows: check its mode and its mount"
        on_problem(Problem(path=path, line=number + 1, reason=reason))


def parse_sample(data: bytes, number: int, path: str, folder: str) -> Sample:
    """The sample that `iter_file` found at an entry's place, once more. Raises UnusableSampleError."""
    entry = parse_line(data, number) if _has_lines(path) else parse_item(data, number)
    return _sample(entry, path, _Bases(folder, path))


def _has_lines(path: str) -> bool:
    return path.lower().endswith(".jsonl")


def _sample(entry: Entry, path: str, bases: _Bases) -> Sample:
    if entry.record is None:
        raise UnusableSampleError(entry.reason)
    return Sample(
        frames=frame_names(entry.record),
        bases=bases.of(entry.record),
        source=f"{path}:{entry.number}",
        record=entry.record,
        layout=layout_of(entry.record),
    )


class _Bases:
    """Where the relative names of one annotation file are looked for: below the data root, then beside the file."""

    def __init__(self, root: str, path: str) -> None:
        self._root = root
        self._beside = os.path.dirname(path)
        self._last: tuple[object, tuple[str, ...]] = (None, self._pair(root))

    def of(self, record: dict[str, Any]) -> tuple[str, ...]:
        data_path = record.get("data_path")
        if data_path != self._last[0]:  # neighbours mostly share it, and then share the tuple
            folder = (
                self._root
                if not data_path
                else os.path.join(self._root, checked_name(data_path, "data_path"))
            )
            self._last = data_path, self._pair(tidy(folder))
        return self._last[1]

    def _pair(self, first: str) -> tuple[str, ...]:
        return (first,) if first == self._beside else (first, self._beside)

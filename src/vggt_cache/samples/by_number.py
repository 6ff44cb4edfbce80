"""Samples by number: one pass over the data notes where each sample is, and each is read again when asked for.

    SampleIndex.build(sources) ──> 28 bytes a sample, in flat arrays ──> index[i] ──> Sample

It holds the same samples as `iter_samples`, in the same order. No file stays open, so that an index can be
used after fork and sent to processes started with spawn.
"""

from __future__ import annotations

import operator
import os
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vggt_cache.errors import DataError
from vggt_cache.samples.episodes import list_steps, step_sample
from vggt_cache.samples.in_order import map_in_order
from vggt_cache.samples.reader import iter_file, parse_sample
from vggt_cache.samples.sample import WORDS_PER_FRAME, Problem, Sample, UnusableSampleError, text_length
from vggt_cache.samples.sources import Sources

_LISTING_THREADS = 16


class SampleIndex:
    """`len(index)` samples, `index[i]` reads one. Make it with `build`."""

    frame_counts: array[int]
    """For each sample how many frames it names; 0 for text alone. As `lengths` int32, which numpy reads in place."""
    lengths: array[int]
    """For each sample the words of its text plus 252 a frame: an estimate of tokens, for grouping by length."""

    def __init__(self, sources: Sources, rows: _Rows) -> None:
        """Use `build`."""
        self._sources = sources
        self._files = sources.files
        self._rows = rows
        self.frame_counts, self.lengths = rows.frames, rows.lengths

    @classmethod
    def build(cls, sources: Sources, *, on_problem: Callable[[Problem], None]) -> SampleIndex:
        """Read all annotations once; what cannot be used is told to `on_problem`, as by `iter_samples`."""
        rows = _Rows()
        for problem in sources.problems:
            on_problem(problem)
        for number, path in enumerate(sources.files):
            rows.add_file(number, path, sources.folder_of(path), on_problem)
        rows.add_episodes(len(sources.files), sources.episode_dirs, on_problem)
        return cls(sources, rows)

    def first(self, count: int) -> SampleIndex:
        """An index of the first `count` samples."""
        return SampleIndex(self._sources, self._rows.first(count))

    def __len__(self) -> int:
        return len(self._rows.source)

    def __getitem__(self, at: int) -> Sample:
        """Sample number `at`; its annotation is read again. Raises DataError where that is no longer possible."""
        at = range(len(self))[operator.index(at)]
        rows, source = self._rows, self._rows.source[at]
        if source >= len(self._files):
            return self._step(at, self._sources.episode_dirs[source - len(self._files)])
        path, number = self._files[source], rows.number[at]
        data = _read_span(path, rows.states[source], rows.offset[at], rows.length[at])
        try:
            return parse_sample(data, number, path, self._sources.folder_of(path))
        except UnusableSampleError as error:
            raise _changed(path, f"{path}:{number} {error}") from error

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def _step(self, at: int, folder: str) -> Sample:
        position = self._rows.number[at]
        return step_sample(folder, position, lambda step: self._rows.name(at - position + step))


class _Rows:
    """Flat arrays with one entry a sample: 28 bytes."""

    def __init__(self) -> None:
        self.source, self.number, self.offset = array("i"), array("i"), array("q")
        self.length, self.frames, self.lengths = array("i"), array("i"), array("i")
        self.states: list[_State] = []
        self.names = bytearray()
        """Of the images of episode folders: listing a folder again for each sample would be slow."""

    def add_file(self, source: int, path: str, folder: str, on_problem: Callable[[Problem], None]) -> None:
        self.states.append(_state(path))
        for entry, sample in iter_file(path, folder, on_problem):
            words = text_length(sample.record)
            self._add(source, entry.number, entry.offset, entry.length, len(sample.frames), words)

    def add_episodes(
        self, first: int, folders: tuple[str, ...], on_problem: Callable[[Problem], None]
    ) -> None:
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            listed = map_in_order(pool, list_steps, folders, 4 * _LISTING_THREADS)
            for source, (folder, (names, problems)) in enumerate(zip(folders, listed, strict=True), first):
                for problem in problems:
                    on_problem(problem)
                self._add_steps(source, folder, names)

    def _add_steps(self, source: int, folder: str, names: list[str]) -> None:
        frames = len(step_sample(folder, 0, names.__getitem__).frames) if names else 0
        for position, name in enumerate(names):
            encoded = os.fsencode(name)
            self._add(source, position, len(self.names), len(encoded), frames, 0)
            self.names += encoded

    def _add(self, source: int, number: int, offset: int, length: int, frames: int, words: int) -> None:
        self.source.append(source)
        self.number.append(number)
        self.offset.append(offset)
        self.length.append(length)
        self.frames.append(frames)
        self.lengths.append(words + WORDS_PER_FRAME * frames)

    def name(self, at: int) -> str:
        """The image of the step that is sample `at`."""
        start = self.offset[at]
        return os.fsdecode(bytes(self.names[start : start + self.length[at]]))

    def first(self, count: int) -> _Rows:
        """A copy of the first rows."""
        rows = _Rows()
        for name in ("source", "number", "offset", "length", "frames", "lengths"):
            setattr(rows, name, getattr(self, name)[:count])
        rows.states, rows.names = self.states, self.names
        return rows


# ---------------------------------------------------------------- files that must stay as they were

_State = tuple[int, int] | None
"""size in bytes, mtime in ns"""


def _state(path: str) -> _State:
    try:
        return _state_of(os.stat(path))
    except OSError:
        return None


def _state_of(status: os.stat_result) -> _State:
    return status.st_size, status.st_mtime_ns


def _read_span(path: str, state: _State, offset: int, length: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _state_of(os.fstat(descriptor)) != state:
                raise _changed(path, "its size or modification time has changed")
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read any more ({error.strerror or error}): check its mode and its mount"
        ) from error
    if len(data) != length:
        raise _changed(path, "it is shorter")
    return data


def _changed(path: str, detail: Any) -> DataError:
    return DataError(
        f"{path} has changed since its samples were counted ({detail}), so that they cannot be found in it: start "
        "again, and leave annotations as they are during training"
    )

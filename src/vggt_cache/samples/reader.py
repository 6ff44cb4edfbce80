"""All samples of a data root: one after the other, or by number.

    iter_samples(sources) ──> Sample, Sample, ...                                  the plan of a precompute
    SampleIndex(sources)  ──> 28 bytes a sample, in flat arrays ──> index[i] ──> Sample        training

Both are one pass of the same reader. An index keeps no file open, so that it can be used after fork and sent to
processes started with spawn.
"""

from __future__ import annotations

import copy
import os
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import xxhash

from vggt_cache.errors import DataError, FileKindError, errors_as
from vggt_cache.samples.annotations import Entry, iter_entries, parse_record
from vggt_cache.samples.episodes import list_steps, step_sample
from vggt_cache.samples.paths import map_in_order, tidy
from vggt_cache.samples.sample import (
    WORDS_PER_FRAME,
    Problem,
    Sample,
    UnusableSampleError,
    check_text_only,
    checked_name,
    frame_names,
    text_length,
)
from vggt_cache.samples.sources import Sources
from vggt_cache.samples.unpacked import HeldText, open_annotations
from vggt_cache.small_files import file_state, open_plain, state_of

OnProblem = Callable[[Problem], None]

_LISTING_THREADS = 16
_PLACE = struct.Struct("<iiqi")
"""Of a sample: the number of its file or episode folder, its number there, and the bytes that it takes there: the
offset and the length of a record, or of the step's image among all such names."""


def iter_samples(sources: Sources, *, on_problem: OnProblem) -> Iterator[Sample]:
    """Samples in a fixed order: JSON Lines files, JSON lists, episode folders, each sorted by path.

    What cannot be used is told to `on_problem`, and the rest is read. Samples without frames come too.
    Memory does not grow with the number of samples.
    """
    for problem in sources.problems:
        on_problem(problem)
    for path in sources.files:
        for _, sample in _iter_file(sources, path, on_problem):
            yield sample
    for folder, names in _iter_episodes(sources, on_problem):
        for position in range(len(names)):
            yield step_sample(folder, position, names.__getitem__)


class SampleIndex:
    """`len(index)` samples, those of `iter_samples` in its order; `index[i]` reads one again.

    All annotations are read once; what cannot be used is told to `on_problem`.
    """

    frame_counts: array[int]
    """For each sample how many frames it names; 0 for text alone. As `lengths` int32, which numpy reads in place."""
    lengths: array[int]
    """For each sample the words of its text plus 252 a frame: an estimate of tokens, for grouping by length."""

    def __init__(self, sources: Sources, *, on_problem: OnProblem) -> None:
        self.frame_counts, self.lengths = array("i"), array("i")
        self._sources = sources
        self._places = bytearray()
        self._kept: array[int] | None = None
        """Of an index `without` some: for each sample its number in `_places`, where all are."""
        self._states = [_size_and_time(file_state(path)) for path in sources.files]
        self._held: dict[str, HeldText] = {}
        """The text of files that are packed or not UTF-8, in which no place could be found again."""
        self._step_names = bytearray()
        """Of the images of episode folders: listing a folder again for each sample would be slow."""
        for problem in sources.problems:
            on_problem(problem)
        for number, path in enumerate(sources.files):
            for entry, sample in _iter_file(sources, path, on_problem, self._held):
                words = text_length(sample.record)
                self._add(number, entry.number, entry.offset, entry.length, len(sample.frames), words)
        for number, (folder, names) in enumerate(_iter_episodes(sources, on_problem), len(sources.files)):
            frames = len(step_sample(folder, 0, names.__getitem__).frames) if names else 0
            for position, name in enumerate(map(os.fsencode, names)):
                self._add(number, position, len(self._step_names), len(name), frames, 0)
                self._step_names += name

    def _add(self, source: int, number: int, offset: int, length: int, frames: int, words: int) -> None:
        self._places += _PLACE.pack(source, number, offset, length)
        self.frame_counts.append(frames)
        self.lengths.append(words + WORDS_PER_FRAME * frames)

    def digest(self) -> str:
        """Of the samples and their order: the bytes of all annotation files, and the names of the steps' images.

        Where they lie does not count. Reads the files once more, at the speed of the disk.
        """
        found = xxhash.xxh3_128()
        for part in (self._places, self.lengths, self.frame_counts, self._step_names):
            found.update(part)
        for path in self._sources.files:
            try:
                with open_annotations(path) as file:
                    while data := file.read(1 << 20):
                        found.update(data)
            except OSError:
                continue  # told when the samples were read
        return found.hexdigest()

    def first(self, count: int) -> SampleIndex:
        """An index of the first `count` samples."""
        index = copy.copy(self)
        index.frame_counts, index.lengths = self.frame_counts[:count], self.lengths[:count]
        if self._kept is None:
            index._places = self._places[: count * _PLACE.size]
        return index

    def without(self, numbers: Iterable[int]) -> SampleIndex:
        """An index without these samples; the others move up."""
        left_out, index = set(numbers), copy.copy(self)
        kept = array("q", (at for at in range(len(self)) if at not in left_out))
        index._kept = kept if self._kept is None else array("q", (self._kept[at] for at in kept))
        index.frame_counts = array("i", (self.frame_counts[at] for at in kept))
        index.lengths = array("i", (self.lengths[at] for at in kept))
        return index

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, at: int) -> Sample:
        """Sample number `at`; its annotation is read again. Raises DataError where that is no longer possible."""
        at = range(len(self))[at]
        at = at if self._kept is None else self._kept[at]
        source, number, offset, length = self._place(at)
        files = self._sources.files
        if source >= len(files):
            folder = self._sources.episode_dirs[source - len(files)]
            return step_sample(folder, number, lambda step: self._step_name(at - number + step))
        if held := self._held.get(files[source]):
            data = held.part(offset, length)
        else:
            data = _read_again(files[source], self._states[source], offset, length)
        try:
            return _sample(parse_record(data, number), self._sources, files[source])
        except UnusableSampleError as error:
            raise _changed(files[source], f"{files[source]}:{number} {error}") from error

    def __iter__(self) -> Iterator[Sample]:
        return (self[at] for at in range(len(self)))

    def _place(self, at: int) -> tuple[int, int, int, int]:
        source, number, offset, length = _PLACE.unpack_from(self._places, at * _PLACE.size)
        return source, number, offset, length

    def _step_name(self, at: int) -> str:
        _, _, offset, length = self._place(at)
        return os.fsdecode(bytes(self._step_names[offset : offset + length]))


# ---------------------------------------------------------------- the pass


def _iter_file(
    sources: Sources, path: str, on_problem: OnProblem, held: dict[str, HeldText] | None = None
) -> Iterator[tuple[Entry, Sample]]:
    """The samples of one annotation file with their places. `held` receives the text of one that is not plain."""
    number = 0
    try:
        with open_annotations(path) as file:
            if held is not None and not file.seekable():
                held[path] = HeldText()
                file = held[path].keep(file)
            for entry in iter_entries(file, path):
                number = entry.number
                try:
                    yield entry, _sample(entry, sources, path)
                except UnusableSampleError as error:
                    on_problem(Problem(path=path, line=number, reason=str(error)))
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error}), nor what follows: check its mode and its mount"
        on_problem(Problem(path=path, line=number + 1, reason=reason))


def _iter_episodes(sources: Sources, on_problem: OnProblem) -> Iterator[tuple[str, list[str]]]:
    """Each episode folder with the images of its steps, in order."""
    with ThreadPoolExecutor(_LISTING_THREADS) as pool:
        listed = map_in_order(pool, list_steps, sources.episode_dirs, 4 * _LISTING_THREADS)
        for folder, (names, problems) in zip(sources.episode_dirs, listed, strict=True):
            for problem in problems:
                on_problem(problem)
            yield folder, names


def _sample(entry: Entry, sources: Sources, path: str) -> Sample:
    """Raises UnusableSampleError."""
    if entry.record is None:
        raise UnusableSampleError(entry.reason)
    data_path = entry.record.get("data_path") or ""
    root = sources.folders.get(path, sources.root)
    frames = frame_names(entry.record)
    if not frames:
        check_text_only(entry.record)
    return Sample(
        frames=frames,
        bases=_bases(root, path, checked_name(data_path, "data_path") if data_path else ""),
        source=f"{path}:{entry.number}",
        record=entry.record,
        layout="conversation" if "conversations" in entry.record else "structured",
    )


@lru_cache(maxsize=1)  # neighbours mostly share it, and then share the tuple
def _bases(root: str, path: str, data_path: str) -> tuple[str, ...]:
    """Where the relative names of a sample are looked for: below the data root, then beside its file."""
    first, beside = tidy(os.path.join(root, data_path)) if data_path else root, os.path.dirname(path)
    return (first,) if first == beside else (first, beside)


# ---------------------------------------------------------------- files that must stay as they were


def _size_and_time(state: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return state and state[:2]


def _read_again(path: str, state: tuple[int, ...] | None, offset: int, length: int) -> bytes:
    fault, remedy = f"{path} cannot be read any more", ": check its mode and its mount"
    with errors_as(DataError, fault, remedy, OSError, FileKindError):
        descriptor = open_plain(path)
        try:
            if _size_and_time(state_of(os.fstat(descriptor))) != state:
                raise _changed(path, "its size or modification time has changed")
            data = os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)
    if len(data) != length:
        raise _changed(path, "it is shorter")
    return data


def _changed(path: str, detail: str) -> DataError:
    return DataError(
        f"{path} has changed since its samples were counted ({detail}), so that they cannot be found in it: start "
        "again, and leave annotations as they are during training"
    )

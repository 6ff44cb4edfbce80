"""Numbers for frames: every name that samples mention, every file that the names lead to, each once.

Two million images fit: while samples are added, one dictionary entry per distinct name; afterwards about a
hundred bytes per file, in flat arrays.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vggt_cache.samples.paths import locate_frame, map_in_order, parts_of
from vggt_cache.samples.sample import Sample
from vggt_cache.small_files import FileState

Reference = tuple[tuple[str, ...], str]
Located = tuple[str, FileState | None]

_NAMES_PER_CALL = 256
_CALLS_AHEAD = 4
_STATE = struct.Struct("<qqqQ")
_MISSING = _STATE.pack(-1, 0, 0, 0)


class FrameTable:
    """Add samples, `resolve` once, then ask.

    A *reference* is a name as a sample writes it, together with the folders it is looked for in. A *frame*
    is the file that it leads to; several references may lead to one frame. Both are numbered in the order
    in which they first appear.
    """

    def __init__(self) -> None:
        self.paths: Sequence[str] = PathList()
        """For each frame its absolute path; before `resolve`, empty."""
        self._names: dict[tuple[str, ...], dict[str, int]] = {}
        self._reference_count = 0
        self._frame_of = array("q")
        self._states = bytearray()
        self._resolved = False

    def __len__(self) -> int:
        """Number of frames."""
        return len(self.paths)

    def add(self, sample: Sample) -> list[int]:
        """The reference ids of a sample's frames, in order."""
        if self._resolved:
            raise ValueError("a FrameTable takes no samples after resolve(): make a new one")
        known = self._names.setdefault(sample.bases, {})
        references = []
        for name in sample.frames:
            reference = known.get(name)
            if reference is None:
                reference = known[name] = self._reference_count
                self._reference_count += 1
            references.append(reference)
        return references

    def resolve(self, threads: int = 16) -> None:
        """Ask the file system for each reference's file, and number the files. Opens none of them."""
        paths = PathList()
        frame_at: dict[str, dict[str, int]] = {}
        with ThreadPoolExecutor(max(1, threads)) as pool:
            parts = parts_of(self._take_references(), _NAMES_PER_CALL)
            for located in map_in_order(pool, _locate_all, parts, max(1, threads) * _CALLS_AHEAD):
                for path, state in located:
                    folder, _, name = path.rpartition("/")
                    frame = frame_at.setdefault(folder, {}).setdefault(name, len(paths))
                    self._frame_of.append(frame)
                    if frame == len(paths):
                        paths.append(folder, name)
                        self._states += _packed(state)
        self.paths = paths
        self._resolved = True

    def frame_ids(self) -> array[int]:
        """For each reference the frame that it leads to, as a flat array of int64."""
        return self._frame_of

    def state(self, frame: int) -> FileState | None:
        """(size, mtime_ns, ctime_ns, inode) of a frame's file at the time of `resolve`; None where it was missing."""
        size, mtime_ns, ctime_ns, inode = _STATE.unpack_from(self._states, frame * _STATE.size)
        return None if size < 0 else (size, mtime_ns, ctime_ns, inode)

    def _take_references(self) -> Iterator[Reference]:
        """All references in order. Names are let go on the way: they are most of the memory."""
        names = [""] * self._reference_count
        group_of = array("l", bytes(array("l").itemsize * self._reference_count))
        groups = list(self._names)
        for group, bases in enumerate(groups):
            for name, reference in self._names.pop(bases).items():
                names[reference], group_of[reference] = name, group
        for reference, group in enumerate(group_of):
            yield groups[group], names[reference]
            names[reference] = ""


class PathList(Sequence[str]):
    """Paths, kept as one number for the folder and a stretch of bytes for the name."""

    def __init__(self) -> None:
        self._folders: list[str] = []
        self._folder_ids: dict[str, int] = {}
        self._folder_of = array("l")
        self._names = bytearray()
        self._ends = array("q", [0])

    def append(self, folder: str, name: str) -> None:
        number = self._folder_ids.setdefault(folder, len(self._folders))
        if number == len(self._folders):
            self._folders.append(folder)
        self._folder_of.append(number)
        self._names += name.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._names))

    def __len__(self) -> int:
        return len(self._folder_of)

    def __getitem__(self, index: Any) -> Any:
        """A path; of a slice, a list."""
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]  # negative indexes, and IndexError, as for a list
        name = self._names[self._ends[at] : self._ends[at + 1]].decode("utf-8", "surrogateescape")
        return f"{self._folders[self._folder_of[at]]}/{name}"


def _locate_all(references: Sequence[Reference]) -> list[Located]:
    return [locate_frame(bases, name) for bases, name in references]


def _packed(state: FileState | None) -> bytes:
    """32 bytes. A state that does not fit (a time stamp after the year 2262) counts as unknown."""
    try:
        return _MISSING if state is None else _STATE.pack(*state)
    except struct.error:
        return _MISSING

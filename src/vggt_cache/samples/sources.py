"""Finds what there is to read below a data root: one walk, no image opened, the same order every time."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import islice

from vggt_cache.errors import DataError, FileKindError
from vggt_cache.samples.annotations import Entry, iter_json_lines, iter_json_list
from vggt_cache.samples.paths import tidy
from vggt_cache.samples.sample import SAMPLE_FIELDS, Problem
from vggt_cache.small_files import open_plain

EPISODE_FILE = "milestones_result.json"
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_PEEK_BYTES = 256 * 1024
_PEEK_ENTRIES = 8
_LOOKED_FOR = f"*.jsonl, *.json (a list of samples), or folders with {EPISODE_FILE}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Everything below a data root that holds samples. Absolute paths, sorted."""

    root: str
    """The data root, or the folder of the annotation file that was named instead."""
    jsonl_files: tuple[str, ...] = ()
    json_files: tuple[str, ...] = ()
    episode_dirs: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Folders and files that could not be looked into."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """For annotation files that were named one by one: where their relative names begin, if not at the root."""

    @property
    def files(self) -> tuple[str, ...]:
        """The annotation files in the order in which they are read."""
        return (*self.jsonl_files, *self.json_files)

    def folder_of(self, path: str) -> str:
        """Below which folder the relative names of an annotation file are looked for first."""
        return self.folders.get(path, self.root)


def find_sources(data_root: str | os.PathLike[str]) -> Sources:
    """Look through `data_root`, a folder or one annotation file.

    Hidden entries are left out; symbolic links are followed, each folder is read once. Raises DataError
    for a root that is absent, cannot be read, or holds no samples.
    """
    given = os.fspath(data_root)
    root = tidy(os.path.join(os.getcwd(), given)) if given else ""
    try:
        status = os.stat(root)
    except (OSError, ValueError) as error:
        raise _unusable(given, error) from error
    if stat.S_ISREG(status.st_mode):
        return _single_file(root)
    if not stat.S_ISDIR(status.st_mode):
        raise DataError(f"the data root {given} is neither a folder nor a file: name the folder of the data")
    walk = _Walk(root)
    walk.run()
    return walk.sources(given)


def _unusable(given: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DataError(f"the data root {given!r} does not exist: check --data_root")
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(
        f"the data root {given!r} cannot be read ({reason}): check the path, its mode and its mount"
    )


def _single_file(path: str) -> Sources:
    folder = os.path.dirname(path)
    try:
        if path.lower().endswith(".jsonl") and _holds_samples(path):
            return Sources(root=folder, jsonl_files=(path,))
        if path.lower().endswith(".json") and _holds_samples(path):
            return Sources(root=folder, json_files=(path,))
    except OSError as error:
        raise _unusable(path, error) from error
    raise DataError(
        f"{path} holds no samples: name a JSON Lines file (*.jsonl), a JSON list of samples (*.json), or the "
        f"folder of the data"
    )


# ---------------------------------------------------------------- the walk


@dataclass
class _Folder:
    """What matters of one folder's entries. Images do not: there may be millions."""

    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    annotations: list[str] = field(default_factory=list)
    is_episode: bool = False


class _Walk:
    """Goes through real folders first, then through those that only a symbolic link leads to."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._seen: set[tuple[int, int]] = set()
        self._jsonl: list[str] = []
        self._json: list[str] = []
        self._episodes: list[str] = []
        self._problems: list[Problem] = []

    def run(self) -> None:
        links = deque([self._root])
        while links:
            waiting = [links.popleft()]
            found_links: list[str] = []
            while waiting:
                folder = self._enter(waiting.pop())
                waiting += folder.folders
                found_links += folder.links
            links.extend(sorted(found_links))

    def sources(self, given: str) -> Sources:
        if not (self._jsonl or self._json or self._episodes):
            unread = f"; {self._problems[0].where} {self._problems[0].reason}" if self._problems else ""
            raise DataError(
                f"no samples were found below {given} (looked for {_LOOKED_FOR}{unread}): check --data_root"
            )
        return Sources(
            root=self._root,
            jsonl_files=tuple(sorted(self._jsonl)),
            json_files=tuple(sorted(self._json)),
            episode_dirs=tuple(sorted(self._episodes)),
            problems=tuple(sorted(self._problems, key=lambda problem: problem.path)),
        )

    def _enter(self, path: str) -> _Folder:
        try:
            if not self._is_new(path):
                return _Folder()
            folder = _entries_of(path)
            if folder.is_episode:
                self._episodes.append(path)
                return _Folder()
            annotations = _without_sidecars(path, folder.annotations)
        except OSError as error:
            if path == self._root:
                raise _unusable(path, error) from error
            self._problems.append(_unreadable(path, error))
            return _Folder()
        for name in annotations:
            self._add(os.path.join(path, name))
        return folder

    def _is_new(self, path: str) -> bool:
        """Whether a folder has not been read under another name; one that contains the root never is new."""
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in self._seen:
            return False
        self._seen.add(identity)
        real = os.path.realpath(path)
        return path == self._root or not self._real_root.startswith(real.rstrip("/") + "/")

    def _add(self, path: str) -> None:
        try:
            if _holds_samples(path):
                (self._jsonl if path.lower().endswith(".jsonl") else self._json).append(path)
        except OSError as error:
            self._problems.append(_unreadable(path, error))


def _entries_of(path: str) -> _Folder:
    folder = _Folder()
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name.lower()
            if entry.name == EPISODE_FILE:
                return _Folder(is_episode=True)
            if name.startswith(".") or name.endswith(IMAGE_EXTENSIONS):
                continue
            if entry.is_dir(follow_symlinks=False):
                folder.folders.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                folder.links.append(entry.path)
            elif name.endswith((".json", ".jsonl")) and _is_readable_kind(entry):
                folder.annotations.append(entry.name)
    return folder


def _is_readable_kind(entry: os.DirEntry[str]) -> bool:
    """A file; or a link that leads nowhere, since opening it will say what is wrong. No pipe: it would block."""
    if not entry.is_symlink():
        return entry.is_file()
    return os.path.isfile(entry.path) or not os.path.exists(entry.path)


def _without_sidecars(path: str, names: list[str]) -> list[str]:
    """Without those *.json that describe the image of the same name beside them: there may be one per image."""
    stems = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".json")}
    if not stems:
        return names
    sidecars = set()
    with os.scandir(path) as entries:
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            if stem in stems and extension.lower() in IMAGE_EXTENSIONS:
                sidecars.add(stems[stem])
    return [name for name in names if name not in sidecars]


def _unreadable(path: str, error: OSError) -> Problem:
    reason = f"cannot be read ({error.strerror or error}): check its mode and its mount"
    return Problem(path=path, line=0, reason=reason)


# ---------------------------------------------------------------- what a file holds


def open_samples(path: str) -> BufferedReader:
    """An annotation file; links are followed, pipes and devices are not waited for. Raises OSError."""
    try:
        return open(open_plain(path), "rb")
    except FileKindError as error:
        raise OSError(errno.EINVAL, "not a plain file", path) from error


def _holds_samples(path: str) -> bool:
    """Whether the beginning of a file looks like samples. One that is only damaged does: its reader will say so."""
    lines = path.lower().endswith(".jsonl")
    with open_samples(path) as file:
        head = file.read(_PEEK_BYTES)
    records = [entry.record for entry in _first_entries(head, lines) if entry.record is not None]
    if records:
        return any(not SAMPLE_FIELDS.isdisjoint(record) for record in records)
    named = any(f'"{name}"'.encode() in head for name in SAMPLE_FIELDS)
    return lines or (named and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["))


def _first_entries(head: bytes, lines: bool) -> Iterator[Entry]:
    file = io.BytesIO(head)
    return islice(iter_json_lines(file) if lines else iter_json_list(file), _PEEK_ENTRIES)

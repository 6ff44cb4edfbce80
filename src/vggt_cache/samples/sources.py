"""Finds what there is to read below a data root: one walk, no image opened, the same order every time."""

from __future__ import annotations

import os
import re
import stat
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from vggt_cache.errors import DataError, SettingsError
from vggt_cache.output import name_text
from vggt_cache.place import require_local
from vggt_cache.samples.annotations import named_lines
from vggt_cache.samples.look import MENTIONED_EXTENSIONS, READ_EXTENSIONS, begins_a_list, look_into
from vggt_cache.samples.paths import tidy
from vggt_cache.samples.sample import Problem

EPISODE_FILE = "milestones_result.json"
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")

_STEP_TEXT = re.compile(r"step_.*\.json", re.IGNORECASE | re.DOTALL)
_MAX_TOLD = 100
_MOST_SIDECARS_OPENED = 100
"""In one folder: there may be one for each of a million images."""
_LOOKED_FOR = f"*.jsonl, *.json (a list of samples), both also as *.gz, or folders with {EPISODE_FILE}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Everything below a data root that holds samples. Absolute paths, in the order in which they are read."""

    root: str
    """The data root, or the folder of the annotation file that was named instead."""
    files: tuple[str, ...] = ()
    """Annotation files: those of JSON Lines, then JSON lists."""
    episode_dirs: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    """Folders and files that could not be looked into."""
    left_out: tuple[Problem, ...] = ()
    """Files that look like annotations and hold no samples that can be read."""
    unlike_names: tuple[Problem, ...] = ()
    """Files that are read otherwise than their names say."""
    folders: Mapping[str, str] = field(default_factory=dict)
    """For annotation files that were named one by one: where their relative names begin, if not at the root."""

    @property
    def jsonl_files(self) -> tuple[str, ...]:
        return tuple(path for path in self.files if named_lines(path))

    @property
    def json_files(self) -> tuple[str, ...]:
        return tuple(path for path in self.files if not named_lines(path))

    def remarks(self) -> Iterator[str]:
        """One line for each file that is left out, or read otherwise than its name says; not without end."""
        yield from (f"{name_text(file.path)} {file.reason}" for file in self.unlike_names[:_MAX_TOLD])
        yield from _left_out_lines(self.left_out, _MAX_TOLD)


def find_sources(data_root: str | os.PathLike[str]) -> Sources:
    """Look through `data_root`, a folder or one annotation file.

    Hidden entries are left out; symbolic links are followed, each folder is read once. Raises DataError
    for a root that is absent, cannot be read, or holds no samples.
    """
    given = os.fspath(data_root)
    root = _absolute(given) if given else ""
    try:
        mode = os.stat(root).st_mode
        if stat.S_ISREG(mode):
            return _single_file(root)
    except (OSError, ValueError) as error:
        raise _unusable(given, error) from error
    if not stat.S_ISDIR(mode):
        raise DataError(f"the data root {given} is neither a folder nor a file: name the folder of the data")
    walk = _Walk(root)
    if not (walk.files or walk.episodes):
        unread = f"; {walk.problems[0].where} {walk.problems[0].reason}" if walk.problems else ""
        lines = "".join(f"; {line}" for line in _left_out_lines(_sorted(walk.left_out), 10))
        raise DataError(
            f"no samples were found below {given} (looked for {_LOOKED_FOR}{unread}): check --data_root{lines}"
        )
    return Sources(
        root=root,
        files=tuple(sorted(walk.files, key=lambda path: (not named_lines(path), path))),
        episode_dirs=tuple(sorted(walk.episodes)),
        problems=_sorted(walk.problems),
        left_out=_sorted(walk.left_out),
        unlike_names=_sorted(walk.unlike_names),
    )


def _sorted(problems: Sequence[Problem]) -> tuple[Problem, ...]:
    return tuple(sorted(problems, key=lambda problem: problem.path))


def _left_out_lines(left_out: Sequence[Problem], at_most: int) -> Iterator[str]:
    yield from (f"left out: {name_text(file.path)} ({file.reason})" for file in left_out[:at_most])
    if len(left_out) > at_most:
        yield f"left out: {len(left_out) - at_most} more files that look like annotations"


def _unusable(given: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DataError(f"the data root {given!r} does not exist: check --data_root")
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(
        f"the data root {given!r} cannot be read ({reason}): check the path, its mode and its mount"
    )


def _single_file(path: str) -> Sources:
    try:
        reason, unlike_name = look_into(path)
    except OSError as error:
        raise _unusable(path, error) from error
    if reason:
        raise DataError(
            f"{path} holds no samples: name a JSON Lines file (*.jsonl), a JSON list of samples (*.json), or the "
            f"folder of the data; left out: {path} ({reason})"
        )
    unlike_names = (Problem(path=path, line=0, reason=unlike_name),) if unlike_name else ()
    return Sources(root=os.path.dirname(path), files=(path,), unlike_names=unlike_names)


# ---------------------------------------------------------------- what flags name


def sources_of(data_root: str | None, annotation_path: str | None, data_path: str | None) -> Sources:
    """A data root, or annotation files with the folders of their images. Raises DataError, SettingsError."""
    if bool(data_root) == bool(annotation_path):
        raise SettingsError(
            f"--data_root is {data_root} and --annotation_path is {annotation_path}: give one of them, a folder "
            "of data or annotation files"
        )
    if data_path and not annotation_path:
        raise SettingsError(
            f"--data_path {data_path} goes with --annotation_path; with --data_root names start there: leave it out"
        )
    given = {"--data_root": data_root, "--annotation_path": annotation_path, "--data_path": data_path}
    for name, paths in given.items():
        for path in _parts(paths or ""):
            require_local(path, name, DataError)
    return (
        sources_of_files(annotation_path, data_path or "")
        if annotation_path
        else find_sources(data_root or "")
    )


def sources_of_files(annotation_path: str, data_path: str = "") -> Sources:
    """The samples of the files in `annotation_path`, whose frames are below the folders in `data_path`.

    Both may hold several paths, with commas between; one folder serves all files. Without a folder, names
    are looked for beside their file, as for a data root that is one file. Raises DataError for files and
    folders that cannot be used.
    """
    files = [_named_file(given) for given in _parts(annotation_path)]
    if not files:
        raise DataError("--annotation_path names no file: give a *.jsonl or *.json with samples")
    for path in files:
        if files.count(path) > 1:
            raise DataError(
                f"--annotation_path names {path} twice, so its samples would count double: name it once"
            )
    folders = _folders(_parts(data_path), files)
    looked = [find_sources(path) for path in files]
    return Sources(
        root=folders[0],
        files=tuple(sorted(files, key=lambda path: not named_lines(path))),
        folders=dict(zip(files, folders, strict=True)),
        unlike_names=tuple(problem for found in looked for problem in found.unlike_names),
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _absolute(path: str) -> str:
    return tidy(os.path.join(os.getcwd(), path))


def _named_file(given: str) -> str:
    path = _absolute(given)
    if os.path.isdir(path):
        raise DataError(f"--annotation_path {given} is a folder: give a folder as --data_root")
    if not os.path.exists(path):
        raise DataError(f"--annotation_path {given} does not exist: check the path and its mount")
    return path


def _folders(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """For each file its folder."""
    for folder in given:
        if not os.path.isdir(folder):
            raise DataError(f"--data_path {folder} is no folder that exists: name the folder of the images")
    if len(given) not in (0, 1, len(files)):
        raise DataError(
            f"--data_path names {len(given)} folders for {len(files)} annotation files: give one for all, or one each"
        )
    folders = [_absolute(folder) for folder in given] or [os.path.dirname(path) for path in files]
    return folders * len(files) if len(folders) == 1 else folders


# ---------------------------------------------------------------- the walk


class _Walk:
    """Goes through real folders first, then through those that only a symbolic link leads to."""

    def __init__(self, root: str) -> None:
        self.files: list[str] = []
        self.episodes: list[str] = []
        self.problems: list[Problem] = []
        self.left_out: list[Problem] = []
        self.unlike_names: list[Problem] = []
        self._root, self._real_root = root, os.path.realpath(root)
        self._seen: set[tuple[int, int]] = set()
        links = deque([root])
        while links:
            waiting, found = [links.popleft()], list[str]()
            while waiting:
                path = waiting.pop()
                try:
                    folders_in_it, links_in_it = self._enter(path)
                except OSError as error:
                    if path == root:
                        raise _unusable(path, error) from error
                    self._fail(path, error)
                else:
                    waiting += folders_in_it
                    found += links_in_it
            links.extend(sorted(found))
        self._leave_out_second_names()

    def _leave_out_second_names(self) -> None:
        """Of a file that has several names, the one that is no link is read: its samples would count double."""
        names: dict[tuple[int, int], str] = {}
        for path in sorted(self.files, key=lambda path: (os.path.islink(path), path)):
            with suppress(OSError):  # its reader will say so
                status = os.stat(path)
                name = names.setdefault((status.st_dev, status.st_ino), path)
                if name != path:
                    self._leave_out(path, f"is the same file as {name_text(name)}")
        second = {file.path for file in self.left_out}
        self.files = [path for path in self.files if path not in second]
        self.unlike_names = [file for file in self.unlike_names if file.path not in second]

    def _enter(self, path: str) -> tuple[list[str], list[str]]:
        """Note the samples in a folder; returns the folders in it and the links to folders. Raises OSError.

        Names of images are not kept: there may be millions.
        """
        folders: list[str] = []
        links: list[str] = []
        annotations: list[str] = []
        is_episode = False
        if not self._is_new(path):
            return folders, links
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name.lower()
                if entry.name == EPISODE_FILE:
                    self.episodes.append(path)
                    is_episode = True
                    continue
                if name.startswith(".") or name.endswith(IMAGE_EXTENSIONS):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.is_symlink() and os.path.isdir(entry.path):
                    links.append(entry.path)
                elif name.endswith(READ_EXTENSIONS):
                    annotations.append(entry.name)
                elif reason := next(
                    (MENTIONED_EXTENSIONS[end] for end in MENTIONED_EXTENSIONS if name.endswith(end)), ""
                ):
                    self._leave_out(entry.path, reason)
        if is_episode:
            self._leave_out_beside_steps(path, [*map(os.path.basename, [*folders, *links]), *annotations])
            return [], []
        for name in self._without_sidecars(path, annotations):
            self._look_into(os.path.join(path, name))
        return folders, links

    def _is_new(self, path: str) -> bool:
        """Whether a folder has not been read under another name; one that contains the root never is new."""
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        if identity in self._seen:
            return False
        self._seen.add(identity)
        real = os.path.realpath(path)
        return path == self._root or not self._real_root.startswith(real.rstrip("/") + "/")

    def _look_into(self, path: str) -> None:
        try:
            reason, unlike_name = look_into(path)
        except OSError as error:
            self._fail(path, error)
            return
        if reason:
            self._leave_out(path, reason)
            return
        self.files.append(path)
        if unlike_name:
            self.unlike_names.append(Problem(path=path, line=0, reason=unlike_name))

    def _without_sidecars(self, path: str, names: list[str]) -> list[str]:
        """Without those *.json that describe the image of the same name beside them: there may be one per image.

        A list is no description.
        """
        stems = {os.path.splitext(name)[0] for name in names if name.lower().endswith(".json")}
        if not stems:
            return names
        with os.scandir(path) as entries:
            parts = (os.path.splitext(entry.name) for entry in entries)
            described = {stem for stem, end in parts if stem in stems and end.lower() in IMAGE_EXTENSIONS}
        if not described:
            return names
        beside = sorted(
            name
            for name in names
            if name.lower().endswith(".json") and os.path.splitext(name)[0] in described
        )
        lists = {name for name in beside[:_MOST_SIDECARS_OPENED] if begins_a_list(os.path.join(path, name))}
        sidecars = [name for name in beside if name not in lists]
        self._leave_out_all(path, sidecars, "describes the image of the same name")
        return sorted({*names} - {*sidecars})

    def _leave_out_beside_steps(self, path: str, names: list[str]) -> None:
        """What an episode folder holds beside its steps: samples that name the same images would double them."""
        others = sorted(name for name in names if not _STEP_TEXT.fullmatch(name))
        self._leave_out_all(path, others, "is in an episode folder, of which only the steps are read")

    def _leave_out_all(self, path: str, names: list[str], reason: str) -> None:
        """Those in one folder, in one line."""
        if names:
            more = f", and {len(names) - 1} more there" if len(names) > 1 else ""
            self._leave_out(os.path.join(path, names[0]), f"{reason}{more}")

    def _leave_out(self, path: str, reason: str) -> None:
        self.left_out.append(Problem(path=path, line=0, reason=reason))

    def _fail(self, path: str, error: OSError) -> None:
        reason = f"cannot be read ({error.strerror or error}): check its mode and its mount"
        self.problems.append(Problem(path=path, line=0, reason=reason))

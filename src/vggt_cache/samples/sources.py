"""Finds what there is to read below a data root: one walk, no image opened, the same order every time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from vggt_cache.errors import DataError, SettingsError
from vggt_cache.output import name_text
from vggt_cache.place import require_local
from vggt_cache.samples.annotations import named_lines
from vggt_cache.samples.look import look_into
from vggt_cache.samples.paths import tidy
from vggt_cache.samples.sample import Problem
from vggt_cache.samples.walk import EPISODE_FILE, Walk, unusable

_MAX_TOLD = 100
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
        raise unusable(given, error) from error
    if not stat.S_ISDIR(mode):
        raise DataError(f"the data root {given} is neither a folder nor a file: name the folder of the data")
    walk = Walk(root)
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


def _single_file(path: str) -> Sources:
    try:
        reason, unlike_name = look_into(path)
    except OSError as error:
        raise unusable(path, error) from error
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

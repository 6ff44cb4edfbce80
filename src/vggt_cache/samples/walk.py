"""The walk through a data root: which files and folders in it hold samples, and why others are left out."""

from __future__ import annotations

import os
import re
from collections import deque
from contextlib import suppress

from vggt_cache.errors import DataError
from vggt_cache.output import name_text
from vggt_cache.samples.look import MENTIONED_EXTENSIONS, READ_EXTENSIONS, begins_a_list, look_into
from vggt_cache.samples.sample import Problem

EPISODE_FILE = "milestones_result.json"
IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_STEP_TEXT = re.compile(r"step_.*\.json", re.IGNORECASE | re.DOTALL)
_MOST_SIDECARS_OPENED = 100
"""In one folder: there may be one for each of a million images."""


class Walk:
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
                        raise unusable(path, error) from error
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


def unusable(given: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return DataError(f"the data root {given!r} does not exist: check --data_root")
    reason = error.strerror if isinstance(error, OSError) else error
    return DataError(
        f"the data root {given!r} cannot be read ({reason}): check the path, its mode and its mount"
    )

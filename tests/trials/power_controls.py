"""The trials of power loss tried themselves: a commit that lacks a step must be found out by them.

Each control is a `FileSystem` that leaves out or misplaces one step, and the model of power loss that should show it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trials.power_loss import LOSSES, lose_power
from vggt_cache.errors import StoreError
from vggt_cache.store import FileSystem
from vggt_cache.store.filesystem import Buffer

MOST_SERIES = 40
"""Mounted disks, each of which loses power `LOSSES` times, within which a control must be found out."""
NOTICED = (AssertionError, StoreError, FileNotFoundError)
"""What a violation looks like. A trial that could not be made is none of these."""


class FileNotSynced(FileSystem):
    def fsync(self, fd: int) -> None:
        """Leave the contents to the system."""


class DirectoryNotSynced(FileSystem):
    def fsync_directory(self, dir_fd: int) -> None:
        """Leave the names to the system."""


class LinkedFirst(FileSystem):
    """The file gets its name, and then its contents are synced. Both are before `commit` returns."""

    def __init__(self) -> None:
        self._late: int | None = None

    def fsync(self, fd: int) -> None:
        self._late = os.dup(fd)

    def fsync_directory(self, dir_fd: int) -> None:
        if self._late is not None:
            super().fsync(self._late)
            os.close(self._late)
            self._late = None
        super().fsync_directory(dir_fd)


class HeaderWrittenLast(FileSystem):
    """The header is written after the file was synced."""

    def __init__(self) -> None:
        self._header: Buffer = b""

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        if offset:
            return super().pwrite(fd, data, offset)
        self._header = bytes(data)
        return len(data)

    def fsync(self, fd: int) -> None:
        super().fsync(fd)
        super().pwrite(fd, self._header, 0)


@dataclass(frozen=True, kw_only=True)
class Control:
    """One way to get it wrong."""

    name: str
    fs: Callable[[], FileSystem]
    """Makes what the writers, or for `creates` the maker of the store, take for the operating system."""
    model: str
    """Which power loss shows it."""
    creates: bool = False


CONTROLS = (
    Control(name="file not synced", fs=FileNotSynced, model="data"),
    Control(name="directory not synced", fs=DirectoryNotSynced, model="names"),
    Control(name="linked before synced", fs=LinkedFirst, model="data"),
    Control(name="header written after the sync", fs=HeaderWrittenLast, model="data"),
    Control(name="folders of a new store not synced", fs=DirectoryNotSynced, model="names", creates=True),
)


def find_out(control: Control, first_seed: int, folder: Path) -> str:
    """What the first violation says. Raises AssertionError where there is none within the bound."""
    for seed in range(first_seed, first_seed + MOST_SERIES):
        own = folder / f"{control.name}-{seed}"
        own.mkdir(parents=True)
        fs = control.fs()
        try:
            lose_power(seed, own, control.model, **{"creator" if control.creates else "writer": fs})
        except NOTICED as error:
            return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{control.name}: not found out in {MOST_SERIES * LOSSES} losses of power")


def fuse_controls(seed: int, folder: Path) -> int:
    """Every control must be found out."""
    for control in CONTROLS:
        find_out(control, seed * MOST_SERIES, folder)
    return len(CONTROLS)

"""Small file systems that a trial mounts for itself and takes down again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trials.registry import Unavailable


def run(*command: str) -> None:
    """Raises Unavailable with what the command said where it is missing or does not succeed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {' '.join(done.stderr.split())}")


@contextmanager
def mounted(mount: Path, most_bytes: int, *command: str) -> Iterator[Path]:
    """Mount on the new folder `mount`; a trial may fill what is no larger than `most_bytes`."""
    mount.mkdir()
    run("mount", *command, str(mount))
    try:
        # Filling is allowed only when this really is the small file system that was asked for.
        status = os.statvfs(mount)
        assert os.path.ismount(mount)
        assert status.f_blocks * status.f_frsize <= most_bytes
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def make_image(image: Path, size_bytes: int, *command: str) -> None:
    """A file of zeros that the command, which gets its path at the end, makes into a file system."""
    with image.open("wb") as file:
        file.truncate(size_bytes)
    run(*command, str(image))

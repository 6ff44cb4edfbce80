"""A disk that is as slow as one says, and what is needed to find files cold on any disk.

memory_disk    ext4 on a loop device whose file lies in memory: nothing but the throttle limits it (needs root)
throttle       a control group of version 1 (blkio): the processes that join it read from the disk under a folder
               at so many bytes per second. The kernel delays their requests; it drops and merges none (needs root)
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup/blkio")
MEMORY = Path("/dev/shm")


class Unavailable(Exception):
    """This machine cannot make such a device; the message says what it lacks."""


@contextmanager
def memory_disk(size_bytes: int) -> Iterator[Path]:
    """An empty folder on an ext4 file system in memory. Raises Unavailable."""
    if not os.access(MEMORY, os.W_OK):
        raise Unavailable(f"{MEMORY} is missing or may not be written")
    free_bytes = shutil.disk_usage(MEMORY).free
    if free_bytes < size_bytes:
        raise Unavailable(
            f"{MEMORY} has {free_bytes} bytes free, and {size_bytes} are needed: take fewer features"
        )
    with tempfile.TemporaryDirectory(dir=MEMORY) as memory, tempfile.TemporaryDirectory() as mount:
        image = Path(memory) / "disk"
        image.touch()
        os.truncate(image, size_bytes)
        device = _run("losetup", "--find", "--show", str(image))
        try:
            _run("mkfs.ext4", "-q", "-m", "0", device)
            _run("mount", device, mount)
            try:
                yield Path(mount)
            finally:
                _run("umount", mount)
        finally:
            _run("losetup", "--detach", device)


@contextmanager
def throttle(folder: Path, bytes_per_s: int) -> Iterator[Path]:
    """A control group whose processes read from the disk under `folder` no faster. Raises Unavailable."""
    if not (GROUPS / "blkio.throttle.read_bps_device").is_file():
        raise Unavailable(f"there is no control group of version 1 with a throttle at {GROUPS}")
    group = GROUPS / f"vggt-cache-{secrets.token_hex(4)}"
    try:
        group.mkdir()
    except OSError as error:
        raise Unavailable(f"no control group can be made in {GROUPS} ({error})") from error
    try:
        _set_limit(group, folder, bytes_per_s)
        yield group
    finally:
        group.rmdir()


def join(group: Path) -> None:
    """Put this process, and all threads of it, into a control group."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _set_limit(group: Path, folder: Path, bytes_per_s: int) -> None:
    number = os.stat(folder).st_dev
    disk = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    try:
        if (disk / "partition").exists():  # only whole disks are throttled
            disk = disk.parent
        device = (disk / "dev").read_text().strip()
        (group / "blkio.throttle.read_bps_device").write_text(f"{device} {bytes_per_s}")
    except OSError as error:
        raise Unavailable(f"the disk under {folder} cannot be throttled ({error})") from error


def _run(*command: str) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        raise Unavailable(f"{command[0]} failed ({str(said).strip()}); it needs root") from error


# ---------------------------------------------------------------- cold files


def drop_pages(folder: Path) -> None:
    """Nothing of the files below `folder` is in page cache afterwards. They must have been synced."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def read_ahead_bytes(folder: Path) -> int | None:
    """How far the kernel reads ahead on the file system of `folder`; None where it does not tell."""
    number = os.stat(folder).st_dev
    told = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb")
    return 1024 * int(told.read_text()) if told.is_file() else None


def bytes_from_disks() -> int:
    """That this process has fetched so far: read-ahead is counted, page cache is not."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise Unavailable("this system does not count a process's reads in /proc/self/io")

"""The one seam between the store and the operating system.

Every operation that the store performs on files goes through a `FileSystem`, so that tests can put a faulty
or simulated one in its place. Names are opened relative to a directory handle and are never followed when
they are links; reads carry their own offset, so a descriptor shared by fork cannot lead a reader astray.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import ParamSpec, TypeVar

Buffer = bytes | bytearray | memoryview
P = ParamSpec("P")
T = TypeVar("T")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not block us, and is then refused as not regular


class FileSystem:
    """The operating system's calls, one method each. All raise OSError; none loops, retries or cleans up."""

    def open_directory(self, path: str, *, dir_fd: int | None = None, follow: bool = True) -> int:
        flags = _READ | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        return os.open(path, flags, dir_fd=dir_fd)

    def open_file(self, name: str, *, dir_fd: int) -> int:
        return os.open(name, _READ | _NO_LINK, dir_fd=dir_fd)

    def create_file(self, name: str, *, dir_fd: int) -> int:
        """A new file; its mode is what the user's umask leaves of rw-rw-rw-."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def scratch_file(self) -> int:
        """A nameless file outside the store, gone when it is closed."""
        with tempfile.TemporaryFile(prefix="vggt-cache-") as file:
            return os.dup(file.fileno())

    def close(self, fd: int) -> None:
        os.close(fd)

    def pread(self, fd: int, length: int, offset: int) -> bytes:
        return os.pread(fd, length, offset)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def expect_scattered_reads(self, fd: int) -> None:
        """A hint that reads will not follow each other, so that nothing is fetched that nobody asked for.

        Only for disks of this machine. Through a network, or whatever else has no device, it is reading ahead that
        keeps several requests under way.
        """
        if _lies_on_a_disk(fd):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        """A hint that these bytes are final, so that the disk takes them while the next ones are being made.

        Only for disks of this machine. Linux starts to write what is dirty in the range before it drops what is clean
        there, and of bytes that were just written nothing is clean; elsewhere they may be on the server already, and
        would only be dropped.
        """
        if _lies_on_a_disk(fd):
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def fsync_directory(self, dir_fd: int) -> None:
        os.fsync(dir_fd)

    def set_mode(self, fd: int, mode: int) -> None:
        os.fchmod(fd, mode)

    def try_lock(self, fd: int) -> bool:
        """Whether this descriptor now holds the file's advisory lock."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def stat(self, name: str, *, dir_fd: int) -> os.stat_result:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)

    def list_names(self, dir_fd: int) -> list[str]:
        # A directory handle has one read position, which forked processes share: each listing opens its own.
        own = os.open(".", _READ | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            return os.listdir(own)
        finally:
            os.close(own)

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        os.mkdir(path, 0o777, dir_fd=dir_fd)

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        os.link(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        os.rename(source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        os.unlink(name, dir_fd=dir_fd)

    def clock_s(self) -> float:
        """Seconds since 1970."""
        return time.time()


OPERATING_SYSTEM = FileSystem()


def persist(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call's result; the call is repeated for as long as a signal interrupts it."""
    while True:
        try:
            return call(*args, **kwargs)
        except InterruptedError:
            continue


def write_fully(fs: FileSystem, fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`, however little the system takes at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        count = persist(fs.pwrite, fd, rest, offset)
        if count <= 0:
            raise OSError(errno.EIO, "the system accepts no more bytes")
        rest, offset = rest[count:], offset + count


def read_fully(fs: FileSystem, fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; returns the bytes read, fewer than asked only at the end of the file."""
    done = 0
    while done < len(target):
        count = persist(fs.preadv, fd, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def read_bytes(fs: FileSystem, fd: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`, fewer only at the end of the file."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: read_fully(fs, fd, memoryview(buffer), offset)])


def sync_directory(fs: FileSystem, dir_fd: int) -> None:
    """fsync a directory; file systems that do not have the notion (EINVAL) are believed to need none."""
    try:
        fs.fsync_directory(dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def release(fs: FileSystem, fd: int) -> None:
    """Close a descriptor that was read from or only held: an error in closing it can no longer matter."""
    with suppress(OSError):
        fs.close(fd)


def _lies_on_a_disk(fd: int) -> bool:
    """Whether the file's device is a real one: network and FUSE file systems have none of their own, major number 0."""
    return os.major(os.fstat(fd).st_dev) != 0


def is_regular(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)

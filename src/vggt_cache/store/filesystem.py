"""The one seam between the store and the operating system, and what the system's refusals mean to the user.

Tests put a faulty or simulated `FileSystem` in its place. Names are opened relative to a directory handle, and links
are not followed; reads carry their own offset, so a descriptor shared by fork cannot lead a reader astray.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import ParamSpec, TypeVar

from vggt_cache.errors import CacheAccessError, CommitError
from vggt_cache.place import is_url

Buffer = bytes | bytearray | memoryview
P = ParamSpec("P")
T = TypeVar("T")

_READ = os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK  # a FIFO must not block us, and is then refused as not regular


class FileSystem:
    """The operating system's calls, one method each. All raise OSError, but never because a signal interrupted them.

    Python repeats such calls by itself, except those about names, which network file systems may interrupt too.
    """

    reads_whole = False
    """Whether a record is best read by one call, however large it is."""

    def open_directory(self, path: str, *, dir_fd: int | None = None, follow: bool = True) -> int:
        flags = _READ | os.O_DIRECTORY | (0 if follow else os.O_NOFOLLOW)
        return os.open(path, flags, dir_fd=dir_fd)

    def open_file(self, name: str, *, dir_fd: int) -> int:
        return os.open(name, _READ | _NO_LINK, dir_fd=dir_fd)

    def reopen_direct(self, fd: int) -> int:
        """Another descriptor of the same file, whose reads go past the page cache and must be of whole blocks.

        Raises OSError where the file system, or a file that is none of the system's, has no such reads.
        """
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)

    def create_file(self, name: str, *, dir_fd: int) -> int:
        """A new file; its mode is what the user's umask leaves of rw-rw-rw-."""
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def probe(self, fd: int, memory: memoryview, offset: int) -> None:
        """Write one byte into `memory`, the one at `offset`. Raises OSError (EFAULT) where it cannot be written."""
        self.preadv(fd, [memory[:1]], offset)

    def expect_scattered_reads(self, fd: int) -> None:
        """A hint that reads will not follow each other, so that the system fetches nothing that nobody asked for.

        Only for disks of this machine: through a network it is reading ahead that keeps several requests under way.
        """
        if _lies_on_a_disk(fd):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        """A hint that these bytes are final, so that the disk takes them while the next ones are being made.

        Only for disks of this machine. There Linux begins to write what is dirty, and just-written bytes are; elsewhere
        they may be on the server already, and would only be dropped from memory.
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
        return _repeated(os.stat, name, dir_fd=dir_fd, follow_symlinks=False)

    def list_names(self, dir_fd: int) -> list[str]:
        # A directory handle has one read position, which forked processes share: each listing opens its own.
        own = os.open(".", _READ | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            return _repeated(os.listdir, own)
        finally:
            os.close(own)

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        _repeated(os.mkdir, path, 0o777, dir_fd=dir_fd)

    def remove_directory(self, path: str) -> None:
        os.rmdir(path)

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        _repeated(os.link, source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd, follow_symlinks=False)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        _repeated(os.rename, source, target, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    def unlink(self, name: str, *, dir_fd: int) -> None:
        _repeated(os.unlink, name, dir_fd=dir_fd)

    def clock_s(self) -> float:
        """Seconds since 1970."""
        return time.time()


OPERATING_SYSTEM = FileSystem()


def _repeated(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call's result; the call is repeated for as long as a signal interrupts it."""
    while True:
        with suppress(InterruptedError):
            return call(*args, **kwargs)


def write_fully(fs: FileSystem, fd: int, data: Buffer, offset: int) -> None:
    """Write all of `data` at `offset`, however little the system takes at a time."""
    rest = memoryview(data).cast("B")
    while rest:
        count = fs.pwrite(fd, rest, offset)
        if count <= 0:
            raise OSError(errno.EIO, "the system accepts no more bytes")
        rest, offset = rest[count:], offset + count


def read_fully(fs: FileSystem, fd: int, target: memoryview, offset: int) -> int:
    """Fill `target` from `offset`; returns the bytes read, fewer than asked only at the end of the file."""
    done = 0
    while done < len(target):
        count = fs.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def probe(fs: FileSystem, fd: int, target: memoryview, offset: int) -> int:
    """Raises OSError (EFAULT) where `target`, whose first byte is written to, cannot be written."""
    fs.probe(fd, target, offset)
    return 1


def read_bytes(fs: FileSystem, fd: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`, fewer only at the end of the file."""
    buffer = bytearray(length)
    return bytes(memoryview(buffer)[: read_fully(fs, fd, memoryview(buffer), offset)])


def sync_directory(fs: FileSystem, dir_fd: int) -> None:
    """fsync a directory; a file system that does not know this operation (EINVAL) is taken to need none."""
    try:
        fs.fsync_directory(dir_fd)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def release(fs: FileSystem, fd: int) -> None:
    """Close a descriptor that was only read from, so that an error in closing it does not matter."""
    with suppress(OSError):
        fs.close(fd)


@contextmanager
def released_after(fs: FileSystem, fd: int) -> Iterator[int]:
    """The descriptor, which is released after the body."""
    try:
        yield fd
    finally:
        release(fs, fd)


def _lies_on_a_disk(fd: int) -> bool:
    """Whether the file's device is a real one: network and FUSE file systems have none of their own, major number 0."""
    return os.major(os.fstat(fd).st_dev) != 0


def is_regular(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode)


# ---------------------------------------------------------------- what a refusal means: one sentence, with the remedy

_READ_REMEDY = {
    errno.EACCES: "ask its owner for permission (ls -ld shows who that is)",
    errno.EPERM: "ask its owner for permission (ls -ld shows who that is)",
    errno.ENOENT: "it was there before: see whether it was moved or its file system unmounted",
    errno.EROFS: "it is mounted read-only: use a directory that can be written",
    errno.ELOOP: "a symbolic link in this path leads back to itself: correct the link",
    errno.ESTALE: "the network file system has lost it: mount it again and start anew",
    errno.EIO: "the disk or the network reports a fault: see dmesg, and copy the cache elsewhere if it can be read",
    errno.EMFILE: "too many files are open in this process: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOTDIR: "a part of this path is not a directory: correct the path",
}
_WRITE_REMEDY = {
    **_READ_REMEDY,
    errno.ENOSPC: "the disk is full: free some space (df shows how much) and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space (quota shows how much) and run the same command again",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f): raise the limit and run the same command again",
}


class ExplainedError(OSError):
    """A refusal without one of the system's numbers, which says itself what is wrong and what to do."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(cause)
        self.remedy = remedy


def _cause(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _remedy(error: OSError, known: Mapping[int, str], otherwise: str) -> str:
    return error.remedy if isinstance(error, ExplainedError) else known.get(error.errno or 0, otherwise)


def access_error(path: str, error: OSError) -> CacheAccessError:
    remedy = _remedy(error, _READ_REMEDY, "check the file system it lies on")
    return CacheAccessError(f"{path} cannot be used ({_cause(error)}): {remedy}")


@contextmanager
def accessing(path: str) -> Iterator[None]:
    """OSErrors of the body become CacheAccessError about `path`."""
    try:
        yield
    except OSError as error:
        raise access_error(path, error) from error


@contextmanager
def committing(path: str) -> Iterator[None]:
    """OSErrors of the body become CommitError about a file in the directory `path`."""
    try:
        yield
    except OSError as error:
        otherwise = "see that the disk is in order, and run the same command again"
        remedy = _remedy(error, _WRITE_REMEDY, otherwise)
        where = "" if is_url(path) else " to the disk"
        raise CommitError(
            f"a file in {path} could not be written{where} ({_cause(error)}), so it was not committed; "
            f"what was committed before is untouched: {remedy}"
        ) from error

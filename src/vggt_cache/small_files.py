"""Small files: read with a cap, never waited on, and every way to fail is a class in `errors.py`.

Data that a user names (`read_bytes`, `open_plain`) may be links. What lies in a cache directory that others may write
to (`SmallFolder`) may not: links there are not followed, so that nothing is read or written elsewhere.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from vggt_cache.errors import (
    FileAbsentError,
    FileAccessError,
    FileKindError,
    FileTextError,
    FileTooLargeError,
    SmallFileError,
)

_QUIETLY = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
"""Opening a pipe does not wait for its other end, and a terminal does not become ours."""
_READ = os.O_RDONLY | _QUIETLY
_ABSENT = (errno.ENOENT, errno.ESTALE)
_OTHER_KIND = (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR, errno.ENODEV, errno.EEXIST)

FileState = tuple[int, int, int, int]
"""size in bytes, mtime in ns, ctime in ns, inode"""


def state_of(status: os.stat_result) -> FileState:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def file_state(path: str) -> FileState | None:
    """The state of a file that a user named; None where there is none, or its times are out of all bounds."""
    try:
        state = state_of(os.stat(path))
    except (OSError, ValueError):
        return None
    return state if max(map(abs, state[1:3])) < 1 << 63 else None


def read_bytes(path: str, limit: int) -> bytes:
    """All bytes of a file that a user named; links are followed. Raises SmallFileError."""
    with _failures_of(path), _closed_after(open_plain(path)) as descriptor:
        return _read_up_to(path, descriptor, limit)


def read_text(path: str, limit: int) -> str:
    """The same as UTF-8 text; a byte order mark is left out. Raises SmallFileError."""
    try:
        return read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileTextError(path, f"is not UTF-8 text (byte {error.start + 1}): convert it") from error


def open_plain(path: str, flags: int = _READ, *, dir_fd: int | None = None) -> int:
    """A descriptor of a plain file. Raises OSError, and FileKindError for anything else, which is not waited for."""
    descriptor = os.open(path, flags | _QUIETLY, 0o666, dir_fd=dir_fd)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _other_kind(path)
    return descriptor


class SmallFolder:
    """A folder of small files in a cache directory. It holds nothing open; every call raises SmallFileError only."""

    def __init__(self, path: str | os.PathLike[str], *, may_be_link: bool = False) -> None:
        self.path = os.fspath(path)
        self._flags = os.O_DIRECTORY | _READ | (0 if may_be_link else os.O_NOFOLLOW)

    def make(self) -> None:
        """Make it, and the folders above it, unless it is there."""
        with _failures_of(self.path):
            os.makedirs(self.path, exist_ok=True)
        self.names()

    def names(self) -> list[str]:
        with self._opened("") as folder:
            return os.listdir(folder)

    def read(self, name: str, limit: int, offset: int = 0) -> bytes:
        """The bytes from `offset` on; over `limit` of them are refused."""
        with self._file(name, _READ) as descriptor:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return _read_up_to(self.of(name), descriptor, limit)

    def state(self, name: str) -> FileState | None:
        """What changes when the file is touched; None if there is none. Opening makes NFS look anew."""
        try:
            with self._file(name, _READ) as descriptor:
                return state_of(os.fstat(descriptor))
        except SmallFileError:
            return None

    def touch(self, name: str) -> None:
        with self._opened(name) as folder:
            os.utime(name, dir_fd=folder, follow_symlinks=False)

    def append(self, name: str, data: bytes, *, alone: bool = False) -> None:
        """In one write, so that lines of several processes do not mix. Makes folder and file where there are none.

        A file that has a second name is refused: it may be somebody's own, under a name of ours. `alone`: no other
        process appends to this file.
        """
        with _failures_of(self.path):
            os.makedirs(self.path, exist_ok=True)
        with self._file(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
            if os.fstat(descriptor).st_nlink > 1:
                raise _other_kind(name)
            _write(descriptor, data)

    def create(self, name: str, data: bytes) -> bool:
        """Make a file that is not there yet; False where something has this name. Nothing is left of a failure."""
        with self._opened(name) as folder:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _QUIETLY
                descriptor = os.open(name, flags, 0o666, dir_fd=folder)
            except FileExistsError:
                return False
            try:
                with _closed_after(descriptor):
                    _write(descriptor, data)
            except OSError:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
                raise
        return True

    def remove(self, name: str) -> None:
        """Remove a file, unless it is gone."""
        with self._opened(name) as folder, suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def of(self, name: str) -> str:
        """The path of a file."""
        return os.path.join(self.path, name)

    @contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        with _failures_of(self.path):
            folder = os.open(self.path, self._flags)
        with _failures_of(self.of(name)), _closed_after(folder):
            yield folder

    @contextmanager
    def _file(self, name: str, flags: int) -> Iterator[int]:
        with (
            self._opened(name) as folder,
            _closed_after(open_plain(name, flags | os.O_NOFOLLOW, dir_fd=folder)) as descriptor,
        ):
            yield descriptor


@contextmanager
def _closed_after(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _failures_of(path: str) -> Iterator[None]:
    try:
        yield
    except FileKindError as error:
        raise _other_kind(path) from error
    except ValueError as error:  # a NUL byte, or a character that no file name has
        raise FileAccessError(ascii(path), f"cannot be a file name ({error})") from error
    except OSError as error:
        if error.errno in _ABSENT:
            raise FileAbsentError(path, "does not exist") from error
        if error.errno in _OTHER_KIND:
            raise _other_kind(path) from error
        why = f"cannot be read or written ({error.strerror or error}): check its mode, its disk and its mount"
        raise FileAccessError(path, why) from error


def _other_kind(path: str) -> FileKindError:
    return FileKindError(
        path,
        "is not what belongs there (a link, pipe, device or folder for a file, or a file for a folder): remove it",
    )


def _read_up_to(path: str, descriptor: int, limit: int) -> bytes:
    parts = []
    left = limit + 1
    while left and (part := os.read(descriptor, min(left, 1 << 20))):
        parts.append(part)
        left -= len(part)
    if not left:
        raise FileTooLargeError(path, f"has over {limit} bytes, which no such file has: check what it is")
    return b"".join(parts)


def _write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]

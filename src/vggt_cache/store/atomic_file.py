"""How a file comes to be: complete and synced under a temporary name first, then under its own.

1. create `.tmp-<random>` in the directory where the file will live, and write it; the disk is asked to begin at once
2. fsync it, close it
3. link it to its final name (or rename, where the name may be replaced), drop the temporary name
4. fsync the directory

A failure at any step withdraws the earlier ones, except that a final name stays once it was given: the file is
complete, and others, above all `prune`, may rely on it by then. A failed fsync is never repeated: the system may have
forgotten the bytes, and a second fsync would report success.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Sequence
from contextlib import suppress

from vggt_cache.store.filesystem import Buffer, FileSystem, read_bytes, release, sync_directory, write_fully

TEMP_NAME = re.compile(r"\.tmp-[0-9a-f]{16}")
WRITE_BACK_BYTES = 4 * 1024 * 1024
"""After so many new bytes the disk is asked to begin with them: it works while the next are made, not only in fsync."""

_NO_MODES_HERE = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP}
_NO_LINKS_HERE = _NO_MODES_HERE | {errno.EMLINK}
_WRITE_BITS = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class PendingFile:
    """A file that nobody can see yet. All methods raise OSError; after one has, call `discard`."""

    def __init__(self, fs: FileSystem, dir_fd: int) -> None:
        """Create the temporary file in the directory `dir_fd`, which stays the caller's to close."""
        self._fs, self._dir_fd = fs, dir_fd
        self._name = f".tmp-{secrets.token_hex(8)}"
        self._process = os.getpid()
        self._begun = 0
        """Up to here the disk was asked to begin."""
        self._fd: int | None = fs.create_file(self._name, dir_fd=dir_fd)
        try:
            status = fs.fstat(self._fd)
            self._identity = (status.st_dev, status.st_ino)
            self._mode = stat.S_IMODE(status.st_mode)
            with suppress(
                OSError
            ):  # tells `prune`, where locks work, that a writer lives; nothing else rests on it
                fs.try_lock(self._fd)
        except BaseException:
            self.discard()
            raise

    def write(self, data: Buffer, offset: int) -> None:
        fd = self._open_fd()
        write_fully(self._fs, fd, data, offset)
        end = offset + memoryview(data).nbytes
        if end - self._begun >= WRITE_BACK_BYTES:
            with suppress(OSError):  # only a hint: fsync tells what became of the bytes
                self._fs.begin_write_back(fd, self._begun, end - self._begun)
            self._begun = end

    def read(self, length: int, offset: int) -> bytes:
        """What was written there; fewer bytes at the end of the file."""
        return read_bytes(self._fs, self._open_fd(), length, offset)

    def seal(self, *, read_only: bool) -> None:
        """Bring the bytes to the disk and close the file."""
        fd = self._open_fd()
        try:
            if read_only:
                self._fs.set_mode(fd, self._mode & ~_WRITE_BITS)
        except OSError as error:
            if error.errno not in _NO_MODES_HERE:
                raise
        self._fs.fsync(fd)
        self._fd = None  # whatever close says, the descriptor is gone
        self._fs.close(fd)

    def publish_new(self, name: str) -> None:
        """Give the sealed file its name, which no other file may have, and make that durable."""
        self._link_or_rename(name)
        self._drop_temporary_name()
        sync_directory(self._fs, self._dir_fd)

    def publish_over(self, name: str) -> None:
        """Give the sealed file its name in place of the file that had it, and make that durable."""
        self._rename(name)
        sync_directory(self._fs, self._dir_fd)

    def discard(self) -> None:
        """Undo what was done, as far as the system lets us. Does not raise OSError."""
        fd, self._fd = self._fd, None
        if fd is not None:
            release(self._fs, fd)
        if os.getpid() == self._process:  # else this is a forked copy, and the file is the parent's
            self._drop_temporary_name()

    def _open_fd(self) -> int:
        if self._fd is None:
            raise OSError(errno.EBADF, "the file is closed already")
        return self._fd

    def _link_or_rename(self, name: str) -> None:
        try:
            self._fs.link(self._name, name, dir_fd=self._dir_fd)
            return
        except OSError as error:
            if self._is_this_file(name):
                return
            if error.errno not in _NO_LINKS_HERE:
                raise
        # Names carry 64 random bits, so nobody takes this one between the look and the rename.
        with suppress(FileNotFoundError):
            self._fs.stat(name, dir_fd=self._dir_fd)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
        self._rename(name)

    def _rename(self, name: str) -> None:
        try:
            self._fs.rename(self._name, name, dir_fd=self._dir_fd)
        except OSError:
            if not self._is_this_file(name):
                raise

    def _is_this_file(self, name: str) -> bool:
        """Whether what was reported as failed was done: a network file system may repeat a request."""
        try:
            status = self._fs.stat(name, dir_fd=self._dir_fd)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._identity

    def _drop_temporary_name(self) -> None:
        with suppress(OSError):  # a second name of a complete file harms nobody, and `prune` removes it
            self._fs.unlink(self._name, dir_fd=self._dir_fd)


def replace_file(fs: FileSystem, dir_fd: int, name: str, parts: Sequence[Buffer]) -> None:
    """Bring a file with these parts to the disk in place of the one that has the name now. Raises OSError."""
    pending, offset = PendingFile(fs, dir_fd), 0
    try:
        for part in parts:
            pending.write(part, offset)
            offset += memoryview(part).nbytes
        pending.seal(read_only=False)
        pending.publish_over(name)
    except BaseException:
        pending.discard()
        raise

"""Reading shards: names, headers and records, with a bounded number of open files."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import TypeVar

from vggt_cache.errors import CacheAccessError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.faults import access_error, accessing
from vggt_cache.store.filesystem import (
    FileSystem,
    is_regular,
    persist,
    read_bytes,
    release,
    sync_directory,
)
from vggt_cache.store.format import LENGTH_BYTES
from vggt_cache.store.open_shards import OpenShards
from vggt_cache.store.parse import ForeignShardError, ShardHeader, header_length, parse_header
from vggt_cache.store.records import RecordReader
from vggt_cache.store.rows import Record

T = TypeVar("T")

SHARDS_FOLDER = "shards"
SHARD_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}\.safetensors")
_FIRST_READ_BYTES = 64 * 1024
"""Covers the whole header of a shard of the default size."""


class ShardVanishedError(CacheAccessError):
    """A shard of the snapshot is no longer there: removed by `prune` or by hand."""


class ShardReader:
    """The shards of one store. Safe to use from several threads and after fork."""

    def __init__(self, store_dir: str, spec: FeatureSpec, *, fs: FileSystem, max_open: int = 64) -> None:
        """`max_open`: how many shards are kept open. Raises CacheAccessError."""
        self._path = os.path.join(store_dir, SHARDS_FOLDER)
        self._spec = spec
        self._fs = fs
        self._dir_fd: int | None = None
        self._handles: list[int] = []
        self._pool = OpenShards(self._open, fs, max_open)
        self._records = RecordReader(self._path, spec, self._pool, fs)
        self._directory()

    def close(self) -> None:
        self._pool.close()
        handles, self._handles, self._dir_fd = self._handles, [], None
        for handle in handles:
            release(self._fs, handle)

    # ------------------------------------------------------------ names and headers

    def names(self) -> list[str]:
        """Names of all committed shards, in order. Raises CacheAccessError."""
        dir_fd = self._directory()
        if dir_fd is None:
            return []
        try:
            found = self._with_room(lambda: persist(self._fs.list_names, dir_fd))
        except OSError:
            found = self._names_by_path()  # the handle may be stale where the path is not
        return sorted(filter(SHARD_NAME.fullmatch, found))

    def _names_by_path(self) -> list[str]:
        with accessing(self._path):
            dir_fd = persist(self._fs.open_directory, self._path, follow=False)
            # Other threads may be using the old handle, so it stays open until the end.
            self._handles.append(dir_fd)
            self._dir_fd = dir_fd
            return persist(self._fs.list_names, dir_fd)

    def sync_names(self) -> None:
        """Make all names of the folder durable, also those that another process gave. Raises OSError."""
        dir_fd = self._directory()
        if dir_fd is not None:
            sync_directory(self._fs, dir_fd)

    def status(self, name: str) -> os.stat_result | None:
        """The shard's file status; None where there is no such file. Raises CacheAccessError."""
        dir_fd = self._directory()
        if dir_fd is None:
            return None
        try:
            return persist(self._fs.stat, name, dir_fd=dir_fd)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise access_error(os.path.join(self._path, name), error) from error

    def header(self, name: str) -> ShardHeader:
        """Parse a shard's header. Raises ShardFormatError, ShardVanishedError or CacheAccessError."""
        fd, _ = self._open(name)
        try:
            with accessing(os.path.join(self._path, name)):
                header = parse_header(read_header_bytes(self._fs, fd, name), name)
        finally:
            release(self._fs, fd)
        if header.spec != self._spec:
            raise ForeignShardError(
                f"shard {name} belongs to another store ({header.spec.short_name}): move it there"
            )
        return header

    # ------------------------------------------------------------ records

    def read(self, shard: str, record: Record, memory_for: Callable[[Record], memoryview]) -> None:
        """Read a feature into the memory that `memory_for` gives for its record, checked, then unpacked.

        `memory_for` is called only when the file is long enough to hold the record. Raises
        CorruptRecordError, ShardVanishedError, ShardFormatError, CacheAccessError, or SettingsError where a
        package is missing.
        """
        self._records.read(shard, record, memory_for)

    def read_stored(self, shard: str, record: Record, memory_for: Callable[[int], memoryview]) -> memoryview:
        """A record's bytes as they lie in the file, checked, in the memory that `memory_for` gives for so many.

        Raises as `read`.
        """
        return self._records.read_stored(shard, record, memory_for)

    # ------------------------------------------------------------ handles

    def _directory(self) -> int | None:
        """The handle of the shards' folder; None as long as there is none."""
        if self._dir_fd is None:
            try:
                self._dir_fd = persist(self._fs.open_directory, self._path, follow=False)
                self._handles.append(self._dir_fd)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise access_error(self._path, error) from error
        return self._dir_fd

    def _open(self, name: str) -> tuple[int, int]:
        path = os.path.join(self._path, name)
        dir_fd = self._directory()
        if dir_fd is None:
            raise _vanished(path)
        try:
            return self._with_room(lambda: open_regular(self._fs, name, dir_fd))
        except FileNotFoundError as error:
            raise _vanished(path) from error
        except OSError as error:
            raise access_error(path, error) from error

    def _with_room(self, call: Callable[[], T]) -> T:
        """The call's result. Where descriptors run out, shards that nobody is reading are closed, and it goes on."""
        while True:
            seen = self._pool.releases
            try:
                return call()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._pool.release_idle(seen):
                    raise


def _vanished(path: str) -> ShardVanishedError:
    return ShardVanishedError(
        f"{path} is no longer there, although this process has seen it: it was removed, by `vggt-cache prune` "
        "or by hand; open the cache again, or call refresh()"
    )


def open_regular(fs: FileSystem, name: str, dir_fd: int) -> tuple[int, int]:
    """Descriptor and size in bytes of a plain file. Raises ForeignShardError for anything else, or OSError."""
    refusal = ForeignShardError(
        f"shard {name} cannot be read: it is not a plain file; put the file itself there"
    )
    try:
        fd = persist(fs.open_file, name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise refusal from error
        raise
    try:
        status = persist(fs.fstat, fd)
        if not is_regular(status):
            raise refusal
    except BaseException:
        release(fs, fd)
        raise
    return fd, status.st_size


def read_header_bytes(fs: FileSystem, fd: int, name: str) -> bytes:
    """Length field and header. Raises ShardFormatError for an impossible length, or OSError."""
    data = read_bytes(fs, fd, _FIRST_READ_BYTES, 0)
    missing = LENGTH_BYTES + header_length(data, name) - len(data)
    return data + read_bytes(fs, fd, missing, len(data)) if missing > 0 else data

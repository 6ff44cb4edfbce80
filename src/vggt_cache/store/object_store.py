"""A store in a bucket: the calls of the store's file system, made of PUT, GET, HEAD, LIST and DELETE.

A file is collected in memory and becomes an object by one PUT, which is atomic: a process that is killed before leaves
nothing, and nobody sees a part. A folder is what keys begin with. What a listing says of a shard holds for ever, since
shards are never changed, so that a record is read by one GET and nothing else. Other objects are replaced by PUT, and
each opening of one reads one version of it.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import Any

import numpy as np
import xxhash

from vggt_cache.place import absolute, address_of, is_url
from vggt_cache.store.bucket import Meta, bucket_at
from vggt_cache.store.filesystem import OPERATING_SYSTEM, Buffer, FileSystem
from vggt_cache.store.format import SHARD_NAME

_FIRST_HANDLE = 1 << 40
"""No number that the operating system gives, nor takes."""
_WINDOW_BYTES, _MAX_WINDOW_BYTES = 64 * 1024, 32 * 1024 * 1024
"""Of what is read from its start to its end: so much is fetched first, then twice as much each time, and at most."""


def system_of(path: str | os.PathLike[str], given: FileSystem = OPERATING_SYSTEM) -> FileSystem:
    """The file system of a place: a bucket's for a URL, unless the caller has given one. Raises SettingsError."""
    place = absolute(path)
    if given is not OPERATING_SYSTEM or not is_url(place):
        return given
    address = address_of(place)
    return object_file_system(f"{address.scheme}://{address.bucket}")


@lru_cache
def object_file_system(root: str) -> ObjectFileSystem:
    """One for each bucket in a process."""
    return ObjectFileSystem(root)


@dataclass
class _Folder:
    key: str


@dataclass
class _NewObject:
    """Not yet in the bucket."""

    identity: int
    data: bytearray = field(default_factory=bytearray)


@dataclass
class _Object:
    key: str
    meta: Meta
    is_shard: bool
    window: memoryview = field(default_factory=lambda: memoryview(b""))
    window_at: int = 0
    window_bytes: int = _WINDOW_BYTES


class ObjectFileSystem(FileSystem):
    """`root`: such as s3://bucket. Paths are URLs below it. What needs no request does nothing."""

    reads_whole = True

    def __init__(self, root: str) -> None:
        self._root, self._bucket = root, bucket_at(root)
        # Each use of these is one step for the interpreter: a lock could be held by a thread that a fork has not.
        self._numbers = count(_FIRST_HANDLE)
        self._handles: dict[int, _Folder | _NewObject | _Object] = {}
        self._new: dict[str, _NewObject] = {}
        """By key."""
        self._made: set[str] = set()
        """Keys of folders that this process has made or seen; in the bucket an empty one is nothing."""
        self._shards: dict[str, Meta] = {}
        """What listings said, by key."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object_file_system, (self._root,)

    # ------------------------------------------------------------ folders

    def open_directory(self, path: str, *, dir_fd: int | None = None, follow: bool = True) -> int:
        """What a user has named must be there; the folders inside a store, with `follow` off, are there when needed."""
        key = self._key(path, dir_fd)
        if follow and key not in self._made:
            if not self._bucket.has_any(key):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            self._made.add(key)
        return self._handle(_Folder(key))

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        key = self._key(path, dir_fd)
        while key not in self._made:
            self._made.add(key)
            key = key.rpartition("/")[0]

    def remove_directory(self, path: str) -> None:
        self._made.discard(self._key(path, None))

    def list_names(self, dir_fd: int) -> list[str]:
        folders, objects = self._bucket.list_folder(self._folder(dir_fd))
        self._shards.update((found["path"], found) for found in objects if _is_shard(found["path"]))
        return [key.rpartition("/")[2] for key in (*folders, *(found["path"] for found in objects))]

    # ------------------------------------------------------------ files

    def open_file(self, name: str, *, dir_fd: int) -> int:
        key = self._key(name, dir_fd)
        is_shard = _is_shard(key)
        if not is_shard or key not in self._shards:
            meta = self._bucket.head(key)
            if not is_shard:
                return self._handle(_Object(key, meta, is_shard))
            self._shards[key] = meta
        return self._handle(_Object(key, self._shards[key], is_shard))

    def reopen_direct(self, fd: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "a bucket has no page cache")

    def create_file(self, name: str, *, dir_fd: int) -> int:
        new = self._new[self._key(name, dir_fd)] = _NewObject(next(self._numbers))
        return self._handle(new)

    def close(self, fd: int) -> None:
        """What was created stays until it has got its name, or is unlinked."""
        self._handles.pop(fd, None)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        opened, done = self._handles[fd], 0
        for buffer in buffers:
            done += self._read(opened, buffer, offset + done)
        return done

    def probe(self, fd: int, memory: memoryview, offset: int) -> None:
        os.preadv(self._zeros, [memory[:1]], 0)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        new = self._handles[fd]
        assert isinstance(new, _NewObject)
        new.data.extend(bytes(max(0, offset - len(new.data))))
        new.data[offset : offset + len(data)] = data
        return len(data)

    def fstat(self, fd: int) -> os.stat_result:
        opened = self._handles[fd]
        if isinstance(opened, _Object):
            return self._status(opened.meta)
        assert isinstance(opened, _NewObject)
        return _status_of(0, opened.identity, len(opened.data), time.time())

    def stat(self, name: str, *, dir_fd: int) -> os.stat_result:
        return self._status(self._bucket.head(self._key(name, dir_fd)))

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        """The PUT that brings a new object into the bucket, where there is none of this name."""
        self._bucket.put_new(self._key(target, dir_fd), self._new[self._key(source, dir_fd)].data)

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        """The same in place of one that may be there."""
        key = self._key(source, dir_fd)
        self._bucket.put(self._key(target, dir_fd), self._new[key].data)
        del self._new[key]

    def unlink(self, name: str, *, dir_fd: int) -> None:
        key = self._key(name, dir_fd)
        if self._new.pop(key, None) is None:
            self._bucket.delete(key)
            self._shards.pop(key, None)

    # ------------------------------------------------------------ what a bucket does by itself, or not at all

    def expect_scattered_reads(self, fd: int) -> None:
        return

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        return

    def fsync(self, fd: int) -> None:
        return

    def fsync_directory(self, dir_fd: int) -> None:
        return

    def set_mode(self, fd: int, mode: int) -> None:
        return

    def try_lock(self, fd: int) -> bool:
        return True

    # ------------------------------------------------------------ steps

    def _handle(self, opened: _Folder | _NewObject | _Object) -> int:
        number = next(self._numbers)
        self._handles[number] = opened
        return number

    def _folder(self, dir_fd: int) -> str:
        folder = self._handles[dir_fd]
        assert isinstance(folder, _Folder)
        return folder.key

    def _key(self, path: str, dir_fd: int | None) -> str:
        if dir_fd is None:
            return address_of(path).key
        folder = self._folder(dir_fd)
        return f"{folder}/{path}" if folder else path

    def _read(self, opened: _Folder | _NewObject | _Object, buffer: memoryview, offset: int) -> int:
        if isinstance(opened, _NewObject):
            part = memoryview(opened.data)[offset : offset + len(buffer)]
        else:
            assert isinstance(opened, _Object)
            length = min(len(buffer), opened.meta["size"] - offset)
            if length <= 0:
                return 0
            part = self._fetch(opened, offset, length)
        if not len(part):
            return 0
        self.probe(0, buffer, 0)
        self.probe(0, buffer[-1:], 0)
        # numpy lets other threads go on meanwhile.
        np.frombuffer(buffer, np.uint8)[: len(part)] = np.frombuffer(part, np.uint8)
        return len(part)

    def _fetch(self, opened: _Object, offset: int, length: int) -> memoryview:
        """Just these bytes of a shard; of another object a window, of which the next reads will have more."""
        if opened.is_shard:
            return self._bucket.get(opened.key, offset, length)
        at = offset - opened.window_at
        if not 0 <= at <= len(opened.window) - length:
            wanted = min(max(length, opened.window_bytes), opened.meta["size"] - offset)
            opened.window = self._bucket.get(opened.key, offset, wanted, opened.meta["e_tag"])
            opened.window_at, at = offset, 0
            opened.window_bytes = min(2 * wanted, _MAX_WINDOW_BYTES)
        return opened.window[at : at + length]

    def _status(self, meta: Meta) -> os.stat_result:
        identity = xxhash.xxh3_64_intdigest(f"{meta['path']}\0{meta['e_tag']}".encode())
        root = xxhash.xxh3_64_intdigest(self._root.encode())
        return _status_of(root, identity, meta["size"], meta["last_modified"].timestamp())

    @cached_property
    def _zeros(self) -> int:
        """Who reads from it learns whether memory can be written; to write into it would end the process."""
        return os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)


def _is_shard(key: str) -> bool:
    return SHARD_NAME.fullmatch(key.rpartition("/")[2]) is not None


def _status_of(device: int, identity: int, size: int, time_s: float) -> os.stat_result:
    mode = stat.S_IFREG | 0o444
    return os.stat_result((mode, identity, device, 1, os.getuid(), os.getgid(), size, time_s, time_s, time_s))

"""The small files beside a cache's stores, where the cache lies in a bucket: claims, tables of rows, the failures.

An object cannot be appended to. So a file that grows is a folder of parts, named by when they were begun and read in
this order. Each process has its own, the last of which it replaces with more; where others append too, only for a short
while, so that what is later stands later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import xxhash

from vggt_cache.errors import FileAbsentError, FileAccessError, FileTooLargeError
from vggt_cache.place import absolute, address_of, is_url
from vggt_cache.small_files import FileState, SmallFolder
from vggt_cache.store.bucket import bucket_at
from vggt_cache.store.filesystem import ExplainedError

PART_BYTES = 256 * 1024
"""A part grows to about this size: what is appended costs at most so much to send, and a reader few requests."""
PART_MS = 1000
"""So long a part grows to whose file other processes append too."""
_MAX_MARK_BYTES = 4096
_BEATS = 64


def folder_at(path: str | os.PathLike[str], *, may_be_link: bool = False) -> SmallFolder:
    """The small files at a path, or at a URL. Raises SettingsError for a URL that is none."""
    return ObjectFolder(os.fspath(path)) if is_url(path) else SmallFolder(path, may_be_link=may_be_link)


class _Part(NamedTuple):
    key: str
    begun_ms: int
    data: bytes


class ObjectFolder(SmallFolder):
    def __init__(self, url: str) -> None:
        super().__init__(absolute(url))
        address = address_of(url)
        self._key = address.key
        self._bucket = bucket_at(f"{address.scheme}://{address.bucket}")
        self._parts: dict[str, list[tuple[str, int]]] = {}
        """By name the keys and sizes of what a file consists of, as listed last."""
        self._own: dict[str, _Part] = {}
        """By name this process's last part."""

    def make(self) -> None:
        """A bucket has no folders."""

    def names(self) -> list[str]:
        with self._failures_of(""):
            found = self._bucket.list_all(self._key)
        start, self._parts = len(self._key) + bool(self._key), {}
        for meta in sorted(found, key=lambda meta: str(meta["path"])):
            name = meta["path"][start:].partition("/")[0]
            self._parts.setdefault(name, []).append((meta["path"], meta["size"]))
        return sorted(self._parts)

    def read(self, name: str, limit: int, offset: int = 0) -> bytes:
        """What was there at the last `names`; of a file that was not, what is there now."""
        with self._failures_of(name):
            return self._joined(name, self._parts.get(name) or self._parts_of(name), limit, offset)

    def state(self, name: str) -> FileState | None:
        try:
            with self._failures_of(name):
                meta = self._bucket.head(self._key_of(name))
        except (FileAbsentError, FileAccessError):
            return None
        changed_ns = int(meta["last_modified"].timestamp() * 1e9)
        return meta["size"], changed_ns, 0, xxhash.xxh3_64_intdigest(str(meta["e_tag"]).encode())

    def touch(self, name: str) -> None:
        """Put again with another number of blanks behind it: the time alone has whole seconds. Of the folder: nothing,
        since no listing of a bucket is old."""
        if name == ".":
            return
        with self._failures_of(name):
            data = self._bucket.get_whole(self._key_of(name), _MAX_MARK_BYTES) or b""
            content = data.rstrip(b" ")
            blanks = (len(data) - len(content) + 1) % _BEATS
            self._bucket.put(self._key_of(name), content + b" " * blanks)

    def append(self, name: str, data: bytes, *, alone: bool = False) -> None:
        own, now_ms = self._own.get(name), time.time_ns() // 1_000_000
        is_old = own is not None and not alone and now_ms - own.begun_ms >= PART_MS
        if own is None or is_old or len(own.data) + len(data) > PART_BYTES:
            begun_ms = max(now_ms, own.begun_ms + 1 if own else 0)
            own = _Part(f"{self._key_of(name)}/{begun_ms:012x}-{os.urandom(8).hex()}", begun_ms, b"")
        with self._failures_of(name):
            self._bucket.put(own.key, own.data + data)
        self._own[name] = own._replace(data=own.data + data)

    def create(self, name: str, data: bytes) -> bool:
        with self._failures_of(name):
            try:
                self._bucket.put_new(self._key_of(name), data)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        with self._failures_of(name):
            self._bucket.delete(self._key_of(name))

    # ------------------------------------------------------------ steps

    def _key_of(self, name: str) -> str:
        return f"{self._key}/{name}" if self._key else name

    def _parts_of(self, name: str) -> list[tuple[str, int]]:
        """Of a file that was brought here from a disk, the object of its name is the first."""
        key = self._key_of(name)
        parts = [(str(meta["path"]), int(meta["size"])) for meta in self._bucket.list_all(key)]
        try:
            parts.append((key, self._bucket.head(key)["size"]))
        except FileNotFoundError:
            if not parts:
                raise
        return sorted(parts)

    def _joined(self, name: str, parts: list[tuple[str, int]], limit: int, offset: int) -> bytes:
        """What lies behind `offset`; parts before it are not fetched."""
        if sum(size for _, size in parts) - offset > limit:
            what = f"has over {limit} bytes, which no such file has: check what it is"
            raise FileTooLargeError(self.of(name), what)
        found, begin = [], 0
        for key, size in parts:
            if begin + size > offset:
                skipped = max(0, offset - begin)
                found.append(bytes(self._bucket.get(key, skipped, size - skipped)))
            begin += size
        return b"".join(found)

    @contextmanager
    def _failures_of(self, name: str) -> Iterator[None]:
        path = self.of(name).rstrip("/")
        try:
            yield
        except FileNotFoundError as error:
            raise FileAbsentError(path, "does not exist") from error
        except ExplainedError as error:
            raise FileAccessError(path, f"cannot be read or written ({error}): {error.remedy}") from error

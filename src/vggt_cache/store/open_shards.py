"""A bounded number of open shards, shared by the threads of a process."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from vggt_cache.store.filesystem import FileSystem, release
from vggt_cache.store.forks import renew_after_fork


class OpenShard:
    """An open shard and the number of reads that are using it."""

    __slots__ = ("fd", "file_bytes", "users")

    def __init__(self, fd: int, file_bytes: int) -> None:
        self.fd, self.file_bytes, self.users = fd, file_bytes, 0


class OpenShards:
    """Open shards, least recently used first. One in use is never closed, or its number could be another's."""

    def __init__(self, open_one: Callable[[str], tuple[int, int]], fs: FileSystem, limit: int) -> None:
        """`open_one(name)` gives descriptor and size in bytes."""
        self._open_one = open_one
        self._fs = fs
        self._limit = limit
        self._forget()
        renew_after_fork(self)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._shards: OrderedDict[str, OpenShard] = OrderedDict()
        self.releases = 0
        """How often `release_idle` has closed something."""

    def take(self, name: str) -> OpenShard:
        """The shard, which stays open until `give_back`. Raises what `open_one` raises."""
        with self._lock:
            shared = self._shards.get(name)
            if shared is not None:
                self._shards.move_to_end(name)
                shared.users += 1
                return shared
        opened = OpenShard(*self._open_one(name))
        with suppress(OSError):  # a hint, and no more
            self._fs.expect_scattered_reads(opened.fd)
        with self._lock:
            shared = self._shards.setdefault(name, opened)
            shared.users += 1
            idle = self._pop_idle(len(self._shards) - self._limit)
        if shared is not opened:  # another thread was quicker
            idle.append(opened)
        for item in idle:
            release(self._fs, item.fd)
        return shared

    def give_back(self, shard: OpenShard) -> None:
        with self._lock:
            shard.users -= 1

    def _pop_idle(self, count: int) -> list[OpenShard]:
        names = [name for name, shared in self._shards.items() if not shared.users][: max(0, count)]
        return [self._shards.pop(name) for name in names]

    def release_idle(self, seen: int) -> bool:
        """Close what is not in use, because descriptors ran out; from now on keep fewer.

        `seen`: `releases` before the attempt that failed. False: nothing was closed since then, nor can be.
        """
        with self._lock:
            if self.releases != seen:
                return True  # another thread was quicker, and has closed all that was idle
            self._limit = max(1, min(self._limit, len(self._shards) // 2))
            idle = self._pop_idle(len(self._shards))
            for shared in idle:
                release(self._fs, shared.fd)
            self.releases += bool(idle)
        return bool(idle)

    def close(self) -> None:
        with self._lock:
            shards, self._shards = list(self._shards.values()), OrderedDict()
        for shared in shards:
            release(self._fs, shared.fd)

    def start_anew_in_child(self) -> None:
        """After fork: a lock may be held, and a shard in use, by a thread that does not exist here."""
        shards = list(self._shards.values())
        self._forget()
        for shared in shards:
            release(self._fs, shared.fd)

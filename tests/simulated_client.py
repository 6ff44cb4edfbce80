"""One machine's view of a simulated disk, as the store's `FileSystem`: late, refused, killed."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from simulated_disk import Disk, Node, failure
from vggt_cache.store.filesystem import Buffer, FileSystem

FULL = (errno.ENOSPC, errno.EDQUOT)
ANYWHERE = (errno.EIO, errno.ESTALE)
TAKES_SPACE = {"create_file", "pwrite", "link", "rename", "make_directory", "fsync", "close"}
MAY_LIE = {"link", "rename", "unlink"}
"""Operations that a network file system may repeat: done, and reported as failed."""
LATE_TICKS = 60
"""For so many operations another client's change of a name may be unseen."""


class Killed(BaseException):
    """The process is gone. Not an Exception, so that nothing in the store can take it for an error."""


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What may go wrong for one client."""

    rate: float = 0.0
    """Share of the operations that fail with an error."""
    stingy: bool = False
    """Whether reads and writes may move fewer bytes than asked."""
    late: bool = False
    """Whether names that other clients make are seen late, as on a network file system."""
    kill_at: int | None = None
    """Number of the operation that the process does not live to begin."""


@dataclass
class _Open:
    node: Node
    written: bool


class Client(FileSystem):
    """A process on a machine of its own. Descriptors are its own; dead, it does nothing any more."""

    def __init__(
        self, disk: Disk, seed: int = 0, faults: Faults = Faults(), switch: Callable[[], None] = lambda: None
    ) -> None:
        self.disk = disk
        self.faults = faults
        self.dead = False
        self.operations = 0
        self.trace: list[str] = []
        self._random = Random(seed)
        self._switch = switch
        self._next_fd = 1000
        self.open_files: dict[int, _Open] = {}
        self._known: set[tuple[int, str]] = set()

    def die(self) -> None:
        """What the system does for a killed process: descriptors are closed, locks released."""
        self.dead = True
        for opened in self.open_files.values():
            self._unlock(opened)
        self.open_files.clear()

    # ------------------------------------------------------------ what may happen before any operation

    def _begin(self, operation: str) -> bool:
        """Let others run, die, or fail. True: do it, then report a failure all the same."""
        self._live()
        self._switch()
        self._live()
        self.disk.tick += 1
        self.disk.now_s += 0.002
        self.disk.at_tick(self.disk.tick)
        self.operations += 1
        self.trace.append(operation)
        if not self.disk.powered or self.operations == self.faults.kill_at:
            self.die()
        self._live()
        return self._fail_or_lie(operation)

    def _live(self) -> None:
        if self.dead:
            raise Killed

    def _fail_or_lie(self, operation: str) -> bool:
        if self._random.random() >= self.faults.rate:
            return False
        if operation in MAY_LIE and self._random.random() < 0.5:
            return True
        raise self._error(operation)

    def _error(self, operation: str) -> OSError:
        return failure(self._random.choice(ANYWHERE + (FULL if operation in TAKES_SPACE else ())))

    def _fewer(self, length: int) -> int:
        if self.faults.stingy and length > 1 and self._random.random() < 0.3:
            return self._random.randint(1, length - 1)
        return length

    # ------------------------------------------------------------ descriptors

    def _new_fd(self, node: Node, *, written: bool = False) -> int:
        self._next_fd += 1
        self.open_files[self._next_fd] = _Open(node, written)
        return self._next_fd

    def _node(self, fd: int) -> Node:
        if fd not in self.open_files:
            raise failure(errno.EBADF)
        return self.open_files[fd].node

    def _unlock(self, opened: _Open) -> None:
        if opened.node.locked_by == id(opened):
            opened.node.locked_by = None

    def close(self, fd: int) -> None:
        if self.dead:
            return
        if fd not in self.open_files:
            raise failure(errno.EBADF)
        opened = self.open_files.pop(fd)
        self._unlock(opened)
        # Only closing what was written can fail; of all else nobody can tell when it happens.
        if opened.written and self._random.random() < self.faults.rate:
            raise self._error("close")

    # ------------------------------------------------------------ names

    def _start(self, path: str, dir_fd: int | None) -> Node:
        return self.disk.root if dir_fd is None or path.startswith("/") else self._node(dir_fd)

    def _walk(self, path: str, dir_fd: int | None) -> Node:
        node = self._start(path, dir_fd)
        for part in filter(None, path.split("/")):
            node = self._child(node, part)
        return node

    def _child(self, directory: Node, name: str) -> Node:
        if not directory.is_directory:
            raise failure(errno.ENOTDIR)
        entry = (directory.number, name)
        if name in directory.names and (entry in self._known or not self._unseen(entry)):
            self._known.add(entry)
            return directory.names[name]
        raise failure(errno.ENOENT)

    def _unseen(self, entry: tuple[int, str]) -> bool:
        """Whether a change of this name has not reached this client yet."""
        tick, by = self.disk.changed.get(entry, (-LATE_TICKS, self))
        recent = self.faults.late and by is not self and self.disk.tick - tick < LATE_TICKS
        return recent and self._random.random() < 0.5

    def _parent(self, path: str, dir_fd: int | None) -> tuple[Node, str]:
        head, _, name = path.rpartition("/")
        return self._walk(head, dir_fd) if head else self._start(path, dir_fd), name

    def _change(self, directory: Node, *changes: tuple[str, Node | None]) -> None:
        self._known.update((directory.number, name) for name, _ in changes)
        self.disk.change(directory, list(changes), self)

    def open_directory(self, path: str, *, dir_fd: int | None = None, follow: bool = True) -> int:
        self._begin("open_directory")
        node = self._walk(path, dir_fd)
        if not node.is_directory:
            raise failure(errno.ENOTDIR)
        return self._new_fd(node)

    def open_file(self, name: str, *, dir_fd: int) -> int:
        self._begin("open_file")
        return self._new_fd(self._walk(name, dir_fd))

    def reopen_direct(self, fd: int) -> int:
        self._begin("reopen_direct")
        return self._new_fd(self._node(fd))

    def create_file(self, name: str, *, dir_fd: int) -> int:
        self._begin("create_file")
        directory = self._node(dir_fd)
        if name in directory.names:
            raise failure(errno.EEXIST)
        node = self.disk.new_node(stat.S_IFREG | 0o644)
        self._change(directory, (name, node))
        return self._new_fd(node, written=True)

    def list_names(self, dir_fd: int) -> list[str]:
        self._begin("list_names")
        directory = self._node(dir_fd)
        recent = {name for (number, name) in self.disk.changed if number == directory.number}
        late = {name for name in sorted(recent) if self._unseen((directory.number, name))}
        listed = set(directory.names) ^ late
        self._known.update((directory.number, name) for name in listed)
        return self._random.sample(sorted(listed), len(listed))

    def make_directory(self, path: str, *, dir_fd: int | None = None) -> None:
        self._begin("make_directory")
        directory, name = self._parent(path, dir_fd)
        if name in directory.names:
            raise failure(errno.EEXIST)
        self._change(directory, (name, self.disk.new_node(stat.S_IFDIR | 0o755)))

    def remove_directory(self, path: str) -> None:
        self._begin("remove_directory")
        directory, name = self._parent(path, None)
        node = self._existing(directory, name)
        if node.names:
            raise failure(errno.ENOTEMPTY)
        self._change(directory, (name, None))

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        lie = self._begin("link")
        directory = self._node(dir_fd)
        if target in directory.names:
            raise failure(errno.EEXIST)
        self._change(directory, (target, self._existing(directory, source)))
        self._report(lie, "link")

    def rename(self, source: str, target: str, *, dir_fd: int) -> None:
        lie = self._begin("rename")
        directory = self._node(dir_fd)
        self._change(directory, (target, self._existing(directory, source)), (source, None))
        self._report(lie, "rename")

    def unlink(self, name: str, *, dir_fd: int) -> None:
        lie = self._begin("unlink")
        directory = self._node(dir_fd)
        self._existing(directory, name)
        self._change(directory, (name, None))
        self._report(lie, "unlink")

    def _existing(self, directory: Node, name: str) -> Node:
        if name not in directory.names:
            raise failure(errno.ENOENT)
        return directory.names[name]

    def _report(self, lie: bool, operation: str) -> None:
        if lie:
            raise self._error(operation)

    # ------------------------------------------------------------ bytes

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self._begin("preadv")
        data = self._node(fd).data[offset : offset + self._fewer(len(buffers[0]))]
        buffers[0][: len(data)] = data
        return len(data)

    def probe(self, fd: int, memory: memoryview, offset: int) -> None:
        self.preadv(fd, [memory[:1]], offset)

    def expect_scattered_reads(self, fd: int) -> None:
        assert self._node(fd)

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self._begin("pwrite")
        count = self._fewer(len(data))
        node = self._node(fd)
        node.write(bytes(memoryview(data)[:count]), offset)
        node.modified_s = self.disk.now_s
        return count

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        assert offset + length <= len(self._node(fd).data)

    def fsync(self, fd: int) -> None:
        try:
            self._begin("fsync")
        except OSError:
            self._node(fd).fail_to_sync()
            raise
        self._node(fd).sync()

    def fsync_directory(self, dir_fd: int) -> None:
        self._begin("fsync_directory")
        self._node(dir_fd).sync_names()

    # ------------------------------------------------------------ facts

    def set_mode(self, fd: int, mode: int) -> None:
        self._begin("set_mode")
        node = self._node(fd)
        node.mode = stat.S_IFMT(node.mode) | mode

    def try_lock(self, fd: int) -> bool:
        self._begin("try_lock")
        opened = self.open_files[fd]
        if opened.node.locked_by not in (None, id(opened)):
            return False
        opened.node.locked_by = id(opened)
        return True

    def fstat(self, fd: int) -> os.stat_result:
        self._begin("fstat")
        return _status(self._node(fd))

    def stat(self, name: str, *, dir_fd: int) -> os.stat_result:
        self._begin("stat")
        return _status(self._walk(name, dir_fd))

    def clock_s(self) -> float:
        return self.disk.now_s


def _status(node: Node) -> Any:
    times = (node.modified_s,) * 3
    return os.stat_result((node.mode, node.number, 1, node.links, 0, 0, len(node.data), *times))

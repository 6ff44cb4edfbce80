"""Each request of the kernel becomes one operation of the simulated disk."""

from __future__ import annotations

import errno
import stat
import time

from simulated_disk import Disk, Node, failure
from trials.fuse import requests as fuse
from trials.fuse.requests import Request

_CHANGES_MODE, _CHANGES_SIZE = 1 << 0, 1 << 3


class Operations:
    """A method for each name of a request. All raise OSError, which is the reply then."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._nodes = {fuse.ROOT: disk.root}
        """By the number that the kernel knows; kept for as long as the file system lives, since few are made."""
        self._open: dict[int, tuple[Node, list[tuple[str, int, int]]]] = {}
        """By handle: a file, or a directory with its names at the time when it was opened."""
        self._last_handle = 0

    def perform(self, request: Request) -> bytes:
        """The body of the reply."""
        method = getattr(self, f"_{request.name}", None)
        if method is None:
            raise failure(errno.ENOSYS)
        result: bytes = method(request)
        return result

    def forget_handles(self) -> None:
        """All processes are dead, and what they had open is closed."""
        self._open.clear()

    # ------------------------------------------------------------ numbers that the kernel knows

    def _node(self, request: Request) -> Node:
        return self._nodes[request.node]

    def _number(self, node: Node) -> int:
        number = fuse.ROOT if node is self.disk.root else node.number
        self._nodes[number] = node
        return number

    def _child(self, directory: Node, name: str) -> Node:
        if name not in directory.names:
            raise failure(errno.ENOENT)
        return directory.names[name]

    def _attributes(self, node: Node) -> bytes:
        # The model does not count links anew after a power loss; a file that is there has one at least.
        links = max(1, node.links)
        return fuse.attributes(self._number(node), node.mode, len(node.data), links, node.modified_s)

    def _entry(self, node: Node) -> bytes:
        return fuse.entry_reply(self._number(node), self._attributes(node))

    def _opened(self, node: Node, listing: list[tuple[str, int, int]] | None = None) -> bytes:
        self._last_handle += 1
        self._open[self._last_handle] = (node, listing or [])
        return fuse.open_reply(self._last_handle)

    def _handle(self, handle: int) -> tuple[Node, list[tuple[str, int, int]]]:
        if handle not in self._open:
            raise failure(errno.EBADF)
        return self._open[handle]

    # ------------------------------------------------------------ names

    def _lookup(self, request: Request) -> bytes:
        return self._entry(self._child(self._node(request), request.names(0)[0]))

    def _new(self, request: Request, name: str, mode: int) -> Node:
        directory = self._node(request)
        if name in directory.names:
            raise failure(errno.EEXIST)
        node = self.disk.new_node(mode)
        node.modified_s = time.time()
        self._change(directory, (name, node))
        return node

    def _change(self, directory: Node, *changes: tuple[str, Node | None]) -> None:
        self.disk.change(directory, list(changes), self)

    def _create(self, request: Request) -> bytes:
        _, mode, _, _ = request.numbers("4I")
        node = self._new(request, request.names(16)[0], stat.S_IFREG | stat.S_IMODE(mode))
        return self._entry(node) + self._opened(node)

    def _mkdir(self, request: Request) -> bytes:
        mode, _ = request.numbers("2I")
        return self._entry(self._new(request, request.names(8)[0], stat.S_IFDIR | stat.S_IMODE(mode)))

    def _link(self, request: Request) -> bytes:
        directory, (name,) = self._node(request), request.names(8)
        if name in directory.names:
            raise failure(errno.EEXIST)
        node = self._nodes[request.numbers("Q")[0]]
        self._change(directory, (name, node))
        return self._entry(node)

    def _unlink(self, request: Request) -> bytes:
        directory, (name,) = self._node(request), request.names(0)
        self._child(directory, name)
        self._change(directory, (name, None))
        return b""

    def _rename(self, request: Request, body_at: int = 8) -> bytes:
        directory, (source, target) = self._node(request), request.names(body_at)
        if self._nodes[request.numbers("Q")[0]] is not directory:
            raise failure(errno.EXDEV)  # the model's changes are of one directory
        self._change(directory, (target, self._child(directory, source)), (source, None))
        return b""

    def _rename2(self, request: Request) -> bytes:
        if request.numbers("QI")[1]:
            raise failure(errno.EINVAL)
        return self._rename(request, 16)

    def _opendir(self, request: Request) -> bytes:
        directory = self._node(request)
        names = {".": directory, "..": directory, **directory.names}
        return self._opened(
            directory, [(name, self._number(node), node.mode) for name, node in names.items()]
        )

    def _readdir(self, request: Request) -> bytes:
        handle, start, most_bytes = request.numbers("QQI")
        return fuse.listing_reply(self._handle(handle)[1], start, most_bytes)

    def _fsyncdir(self, request: Request) -> bytes:
        self._node(request).sync_names()
        return b""

    # ------------------------------------------------------------ files

    def _open_file(self, request: Request) -> bytes:
        return self._opened(self._node(request))

    def _read(self, request: Request) -> bytes:
        handle, offset, length = request.numbers("QQI")
        return bytes(self._handle(handle)[0].data[offset : offset + length])

    def _write(self, request: Request) -> bytes:
        handle, offset, length = request.numbers("QQI")
        node = self._handle(handle)[0]
        node.write(request.body[40 : 40 + length], offset)
        node.modified_s = time.time()
        return fuse.write_reply(length)

    def _fsync(self, request: Request) -> bytes:
        self._node(request).sync()
        return b""

    def _flush(self, request: Request) -> bytes:
        return b""

    def _release(self, request: Request) -> bytes:
        self._open.pop(request.numbers("Q")[0], None)  # a handle from before a power loss is gone already
        return b""

    # ------------------------------------------------------------ facts

    def _init(self, request: Request) -> bytes:
        return fuse.init_reply()

    def _destroy(self, request: Request) -> bytes:
        return b""

    def _getattr(self, request: Request) -> bytes:
        return fuse.attributes_reply(self._attributes(self._node(request)))

    def _setattr(self, request: Request) -> bytes:
        node, numbers = self._node(request), request.numbers("2I6Q4I")
        if numbers[0] & _CHANGES_SIZE:
            raise failure(errno.EOPNOTSUPP)  # the model has no truncation, and the store does not truncate
        if numbers[0] & _CHANGES_MODE:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(numbers[11])
        return fuse.attributes_reply(self._attributes(node))

    def _statfs(self, request: Request) -> bytes:
        return fuse.statfs_reply()

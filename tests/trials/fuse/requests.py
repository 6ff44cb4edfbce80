"""What the kernel says to a file system in user space, and how it is answered; no library lies between.

A request is a header and a body; a reply is a header with the request's number, an error or a body. Only what the
store's operations lead to is understood, all else is refused with ENOSYS, which the kernel takes for "not here".
The layouts are those of <linux/fuse.h>, protocol 7.31.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from simulated_disk import failure
from trials.registry import Unavailable

DEVICE = "/dev/fuse"
MAX_WRITE_BYTES = 128 * 1024
OPCODES = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 9: "mkdir", 10: "unlink", 12: "rename", 13: "link",
    14: "open_file", 15: "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 25: "flush", 26: "init",
    27: "opendir", 28: "readdir", 29: "release", 30: "fsyncdir", 35: "create", 36: "interrupt", 38: "destroy",
    42: "batch_forget", 45: "rename2",
}  # fmt: skip
WITHOUT_REPLY = {"forget", "batch_forget", "interrupt"}

ROOT = 1
"""The number of the root directory."""
_DETACH, _PARENT_DEATH_SIGNAL = 2, 1
_VERSION = (7, 31)
_BIG_WRITES = 1 << 5
_DIRECT_IO = 1
"""On an open file: the kernel keeps no pages of it, so every read and write becomes a request."""
_REQUEST = struct.Struct("<IIQQIIIHH")
_REPLY = struct.Struct("<IiQ")
_INIT = struct.Struct("<4I2H2I2HI28x")
_ATTRIBUTES = struct.Struct("<6Q10I")
_ENTRY = struct.Struct("<4Q2I")
_FRESH = struct.Struct("<Q2I")
_OPENED = struct.Struct("<QIi")
_DIRENT = struct.Struct("<QQII")
_STATFS = struct.Struct("<5Q4I24x")


@dataclass(frozen=True)
class Request:
    """One request; `node` is the number of the file or directory that it is about."""

    name: str
    unique: int
    node: int
    body: bytes

    def names(self, offset: int) -> list[str]:
        """The texts behind the fixed part of the body."""
        return [os.fsdecode(part) for part in self.body[offset:].split(b"\0")[:-1]]

    def numbers(self, layout: str) -> tuple[int, ...]:
        """The fixed part of the body."""
        return struct.unpack_from(f"<{layout}", self.body)


def mount(folder: Path) -> int:
    """Mount on the new folder; returns the descriptor from which requests are read. Raises Unavailable."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"{DEVICE} cannot be opened: {error.strerror}") from error
    folder.mkdir()
    options = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    # The command mount(8) might look at the folder afterwards, and nobody would answer.
    if _libc().mount(b"forgetful", os.fsencode(folder), b"fuse", 0, options.encode()):
        os.close(fd)
        raise Unavailable(f"no FUSE file system can be mounted: {os.strerror(ctypes.get_errno())}")
    return fd


def unmount(folder: Path) -> None:
    """Take it out of the tree, whoever uses it still."""
    if _libc().umount2(os.fsencode(folder), _DETACH):
        raise failure(ctypes.get_errno())


def end_with_parent() -> None:
    """Have this process killed when the one that forked it is, so that no mount waits for answers for ever."""
    _libc().prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def serve(fd: int, answer: Callable[[Request], bytes]) -> None:
    """Answer requests until the file system is unmounted. An OSError that `answer` raises is the reply."""
    while (request := _next_request(fd)) is not None:
        try:
            body, code = answer(request), 0
        except OSError as error:
            body, code = b"", error.errno or errno.EIO
        if request.name not in WITHOUT_REPLY:
            _reply(fd, request.unique, code, body)


def _next_request(fd: int) -> Request | None:
    while True:
        try:
            data = os.read(fd, MAX_WRITE_BYTES + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                continue  # ENOENT: who had asked is gone
            raise
        _, opcode, unique, node, *_ = _REQUEST.unpack_from(data)
        return Request(OPCODES.get(opcode, str(opcode)), unique, node, data[_REQUEST.size :])


def _reply(fd: int, unique: int, code: int, body: bytes) -> None:
    try:
        os.write(fd, _REPLY.pack(_REPLY.size + len(body), -code, unique) + body)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):  # nobody waits for it any more
            raise


# ---------------------------------------------------------------- bodies of replies


def init_reply() -> bytes:
    return _INIT.pack(*_VERSION, 0, _BIG_WRITES, 0, 0, MAX_WRITE_BYTES, 1, 0, 0, 0)


def attributes(number: int, mode: int, size_bytes: int, links: int, modified_s: float) -> bytes:
    seconds, rest = divmod(int(modified_s * 1e9), 10**9)
    times = (seconds,) * 3 + (rest,) * 3
    sizes = (number, size_bytes, -(-size_bytes // 512))
    return _ATTRIBUTES.pack(*sizes, *times, mode, links, os.geteuid(), os.getegid(), 0, 4096, 0)


def attributes_reply(attributes: bytes) -> bytes:
    """Attributes that the kernel must not keep."""
    return _FRESH.pack(0, 0, 0) + attributes


def entry_reply(number: int, attributes: bytes) -> bytes:
    """A name's file; the kernel must ask again the next time, since a power loss may take the name."""
    return _ENTRY.pack(number, 0, 0, 0, 0, 0) + attributes


def open_reply(handle: int) -> bytes:
    return _OPENED.pack(handle, _DIRECT_IO, 0)


def write_reply(count: int) -> bytes:
    return struct.pack("<II", count, 0)


def listing_reply(entries: list[tuple[str, int, int]], start: int, most_bytes: int) -> bytes:
    """Name, number and mode of each entry from `start` on, as many as fit."""
    result = b""
    for position, (name, number, mode) in enumerate(entries[start:], start + 1):
        text = os.fsencode(name)
        entry = _DIRENT.pack(number, position, len(text), stat.S_IFMT(mode) >> 12) + text
        entry += bytes(-len(entry) % 8)
        if len(result) + len(entry) > most_bytes:
            break
        result += entry
    return result


def statfs_reply() -> bytes:
    return _STATFS.pack(2**20, 2**20, 2**20, 2**20, 2**20, 4096, 255, 4096, 0)

"""A mounted file system that loses power: `simulated_disk.Disk` behind the kernel's requests.

It is served by a process of its own and holds everything in memory. Real processes work in it by system calls
through the real kernel; what they did not sync is forgotten when power is lost, by the rules of the simulated
disk. It needs no library, only Linux with /dev/fuse and the right to mount, which is root's.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

from simulated_disk import Disk, failure
from trials.fuse import requests as fuse
from trials.fuse.operations import Operations
from trials.fuse.requests import Request

PATIENCE_S = 30.0
UNCOUNTED = {"init", "release", "destroy", *fuse.WITHOUT_REPLY}
"""Requests that the kernel makes when it finds the time: counting them would add chance."""


class Power:
    """The trial's hand on the switch."""

    def __init__(self, commands: socket.socket) -> None:
        self._commands = commands
        commands.settimeout(PATIENCE_S)

    def cut_after(self, requests: int) -> None:
        """Let so many requests from now on be done, and none of the later ones: each of them is an EIO."""
        self._send(cut_after=requests)

    def wait_until_cut(self) -> None:
        """Raises TimeoutError where nobody makes so many requests."""
        if not self._commands.recv(64):
            raise RuntimeError("the file system's process is gone")

    def restore(self, seed: int, model: str) -> None:
        """Forget what was not synced, as `Disk.lose_power` does, and go on. All clients must be dead."""
        self._send(restore=seed, model=model)

    def _send(self, **command: Any) -> None:
        self._commands.send(json.dumps(command).encode())


@contextmanager
def forgetful_disk(folder: Path) -> Iterator[Power]:
    """Mounted on the new folder for as long as the context lasts. Raises Unavailable."""
    fd = fuse.mount(folder)
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server = os.fork()
    if server == 0:
        _serve(fd, its, ours)
    # Only the server may hold these: when it ends, so does every request that waits for it.
    os.close(fd)
    its.close()
    try:
        yield Power(ours)
    finally:
        fuse.unmount(folder)
        ours.close()
        os.kill(server, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the file system's process ended with {status}")


def _serve(fd: int, commands: socket.socket, others: socket.socket) -> None:
    status = 1
    try:
        others.close()
        fuse.end_with_parent()
        fuse.serve(fd, _Server(commands).answer)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


class _Server:
    """The disk and its power."""

    def __init__(self, commands: socket.socket) -> None:
        self._commands = commands
        commands.setblocking(False)
        self._disk = Disk()
        self._operations = Operations(self._disk)

    def answer(self, request: Request) -> bytes:
        self._obey()
        if request.name not in UNCOUNTED:
            self._disk.tick += 1
            self._disk.at_tick(self._disk.tick)
            if not self._disk.powered:
                raise failure(errno.EIO)
        return self._operations.perform(request)

    def _obey(self) -> None:
        """Commands that were sent before this request was made."""
        with suppress(BlockingIOError):
            while command := self._commands.recv(1024):
                self._do(**json.loads(command))

    def _do(self, *, cut_after: int | None = None, restore: int | None = None, model: str = "") -> None:
        if cut_after is not None:
            last = self._disk.tick + cut_after
            self._disk.at_tick = lambda tick: self._cut() if tick > last else None
        if restore is not None:
            self._disk.at_tick = lambda tick: None
            self._disk.lose_power(Random(restore), model)
            self._operations.forget_handles()

    def _cut(self) -> None:
        if self._disk.powered:
            self._disk.powered = False
            self._commands.send(b"cut")

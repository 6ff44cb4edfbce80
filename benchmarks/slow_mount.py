"""A read-only view of a folder that is as slow as one says: FUSE, by libfuse 3 and mfusepy (`pip install mfusepy`).

Each request waits `latency_s`, all of them at the same time, as on a network; their bytes pass one after the other at
`bytes_per_s`, as through one wire. The files behind it should lie in page cache, so that nothing else is waited for.
It runs in a process of its own. What it can pass at most is limited by Python: some hundred MB/s.
"""

from __future__ import annotations

import ctypes.util
import errno
import multiprocessing
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slow_disk import Unavailable

MOUNTING_S = 10.0
THREADS = 64
"""Requests that may wait at the same time; libfuse before 3.12 cannot be told and has 10."""


@dataclass(frozen=True, kw_only=True)
class Wire:
    """What lies between a mount and its files."""

    bytes_per_s: float
    latency_s: float
    cached: bool
    """The kernel keeps pages and reads ahead, as it does for NFS; else each read goes straight to the mount."""
    counter: Path
    """A file whose 8 bytes tell how many bytes of files have passed."""

    def passed_bytes(self) -> int:
        return int.from_bytes(self.counter.read_bytes(), "little")


class Traffic:
    """One wire for all requests: each takes its place in the row, and waits until its last byte has passed."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._counter = os.open(wire.counter, os.O_WRONLY)
        self._passed_bytes = 0
        self._free_at_s = 0.0
        self._lock = threading.Lock()

    def carry(self, count: int) -> None:
        with self._lock:
            self._passed_bytes += count
            os.pwrite(self._counter, self._passed_bytes.to_bytes(8, "little"), 0)
            self._free_at_s = max(self._free_at_s, time.monotonic()) + count / self._wire.bytes_per_s
            arrives_at_s = self._free_at_s + self._wire.latency_s
        time.sleep(max(0.0, arrives_at_s - time.monotonic()))


def serve(source: str, mount: str, wire: Wire) -> None:
    """Show `source` at `mount` until it is unmounted."""
    os.environ.setdefault("FUSE_LIBRARY_NAME", "fuse3")
    import mfusepy

    traffic = Traffic(wire)

    class SlowView(mfusepy.Operations):  # type: ignore[misc]
        use_ns = True

        def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
            try:
                found = os.lstat(source + path)
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno or errno.EIO) from error
            names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size")
            times = {f"st_{which}time": getattr(found, f"st_{which}time_ns") for which in "amc"}
            return {**{name: getattr(found, name) for name in names}, **times}

        def readdir(self, path: str, fh: int) -> list[str]:
            return [".", "..", *os.listdir(source + path)]

        def open(self, path: str, flags: int) -> int:
            return os.open(source + path, os.O_RDONLY)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            data = os.pread(fh, size, offset)
            traffic.carry(len(data))
            return data

        def release(self, path: str, fh: int) -> int:
            os.close(fh)
            return 0

    known = {"max_threads": THREADS, "max_idle_threads": THREADS} if mfusepy.fuse_version_minor >= 12 else {}
    mfusepy.FUSE(SlowView(), mount, foreground=True, ro=True, direct_io=not wire.cached, **known)


@contextmanager
def slow_mount(source: Path, mount: Path, wire: Wire) -> Iterator[None]:
    """`source` at `mount`, an empty folder. Raises Unavailable."""
    _check_available()
    wire.counter.write_bytes(bytes(8))
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(str(source), str(mount), wire), daemon=True
    )
    process.start()
    try:
        _wait_until_mounted(mount, process)
        yield
    finally:
        subprocess.run(["fusermount3", "-u", str(mount)], check=False, capture_output=True)
        process.join(MOUNTING_S)
        process.terminate()


def _check_available() -> None:
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        raise Unavailable(f"mfusepy cannot be imported ({error}): pip install mfusepy") from error
    if ctypes.util.find_library("fuse3") is None or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise Unavailable("libfuse 3 or /dev/fuse is missing, or may not be used here: install fuse3")


def _wait_until_mounted(mount: Path, process: Any) -> None:
    deadline_s = time.monotonic() + MOUNTING_S
    while not os.path.ismount(mount):
        if not process.is_alive() or time.monotonic() > deadline_s:
            raise Unavailable(f"FUSE cannot mount here (exit code {process.exitcode})")
        time.sleep(0.02)

"""What a single process relies on when it keeps a cache, tried out with files in a temporary folder."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

from vggt_cache.doctor.findings import Finding
from vggt_cache.doctor.place import FEATURE_BYTES

CLOCK_TOLERANCE_S = 2.0
THROUGHPUT_BYTES = 64 << 20
NAME_BYTES = 128
"""Longest file name that a cache may use."""


def hard_link(folder: Path) -> Finding:
    """A second name for a file."""
    source, target = folder / "link-source", folder / "link-target"
    source.write_bytes(b"one file")
    try:
        os.link(source, target)
    except OSError as error:
        reason = error.strerror or str(error)
        meaning = "A cache does not need hard links; copying one with cp -l will not work here."
        return Finding("hard links", "warn", f"no ({reason})", meaning)
    same = os.stat(target).st_ino == os.stat(source).st_ino and os.stat(source).st_nlink == 2
    if not same:
        return Finding(
            "hard links", "warn", "copies", "A hard link is a copy here, so that it takes space twice."
        )
    return Finding("hard links", "ok", "yes", "A second name of a file takes no space.")


def fsync_file(folder: Path) -> Finding:
    """Whether and how fast a file is forced to the disk."""
    with open(folder / "synced", "wb") as file:
        file.write(bytes(1 << 20))
        file.flush()
        return _timed_fsync(file.fileno(), "fsync of a file", "fail", "a committed shard could be lost")


def fsync_directory(folder: Path) -> Finding:
    """Whether and how fast a new name is forced to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return _timed_fsync(
            descriptor, "fsync of a directory", "warn", "the name of a committed shard could be lost"
        )
    finally:
        os.close(descriptor)


def _timed_fsync(descriptor: int, name: str, status: str, consequence: str) -> Finding:
    started = time.perf_counter()
    try:
        os.fsync(descriptor)
    except OSError as error:
        reason = error.strerror or str(error)
        return Finding(name, status, f"refused ({reason})", f"After a power failure {consequence}.")
    took_ms = (time.perf_counter() - started) * 1000
    return Finding(name, "ok", f"{took_ms:.1f} ms", "It is accepted; each commit of a shard waits that long.")


def clock(folder: Path) -> Finding:
    """Difference between the file system's clock and this machine's, and whether touching a file moves its time."""
    path = folder / "clock"
    before = time.time()
    path.write_bytes(b"")
    after = time.time()
    stamped = path.stat().st_mtime
    offset_s = stamped - (before + after) / 2
    time.sleep(0.05)
    os.utime(path)
    if path.stat().st_mtime <= stamped:
        return Finding(
            "clock", "warn", "does not advance",
            "Touching a file does not move its time within 50 ms, so that a dead process is noticed late.",
        )  # fmt: skip
    if abs(offset_s) > CLOCK_TOLERANCE_S:
        meaning = (
            "The file system's clock and this machine's differ, so that images written lately are read again "
            "when planning: let both use NTP."
        )
        return Finding("clock", "warn", f"{offset_s:+.1f} s", meaning)
    return Finding(
        "clock", "ok", f"{offset_s * 1000:+.0f} ms", "The file system's clock agrees with this machine's."
    )


def new_file_mode(folder: Path) -> Finding:
    """The permissions that new files get."""
    path = folder / "mode"
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = os.stat(path).st_mode & 0o777
    if mode & 0o040:
        return Finding(
            "new files", "ok", f"{mode:04o}", "Members of the group can read the cache that you write."
        )
    meaning = "Only you can read the cache that you write: for a shared one, run umask 027 before precompute."
    return Finding("new files", "warn", f"{mode:04o}", meaning)


def long_name(folder: Path) -> Finding:
    """Whether names of the length that a cache may use are possible."""
    try:
        (folder / ("n" * NAME_BYTES)).write_bytes(b"")
    except OSError as error:
        reason = error.strerror or str(error)
        meaning = "Names of shards may be that long: use another file system."
        return Finding("file names", "fail", f"under {NAME_BYTES} bytes ({reason})", meaning)
    longest = os.pathconf(folder, "PC_NAME_MAX")
    return Finding("file names", "ok", f"{longest} bytes", f"A cache uses names of up to {NAME_BYTES} bytes.")


def write_speed(folder: Path) -> Finding:
    """Writing one large file, fsync included."""
    free = os.statvfs(folder)
    if free.f_bavail * free.f_frsize < 4 * THROUGHPUT_BYTES:
        return Finding(
            "write speed", "warn", "not measured", "There is too little free space to write a test file."
        )
    started = time.perf_counter()
    with open(folder / "large", "wb") as file:
        for part in _parts():
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    rate = THROUGHPUT_BYTES / (time.perf_counter() - started)
    meaning = (
        f"That is {rate / FEATURE_BYTES:,.0f} features of 4.2 MB a second for all writers, fsync included."
    )
    return Finding("write speed", "ok", f"{rate / 1e6:,.0f} MB/s", meaning)


def read_speed(folder: Path) -> Finding:
    """Reading it back with pread, which must return the very bytes at each offset."""
    path = folder / "large"
    if not path.exists():
        return Finding(
            "read speed", "warn", "not measured", "There is too little free space for a test file."
        )
    parts = _parts()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        # Backwards, so that a pread which ignored its offset would return other bytes.
        chunks = {
            i: os.pread(descriptor, len(parts[i]), i * len(parts[i])) for i in reversed(range(len(parts)))
        }
        rate = THROUGHPUT_BYTES / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
    if any(chunks[i] != part for i, part in enumerate(parts)):
        meaning = "What is read is not what was written, so nothing can be kept here: have the disk checked."
        return Finding("read speed", "fail", "wrong bytes", meaning)
    meaning = (
        f"pread returns what was written, {rate / FEATURE_BYTES:,.0f} features a second (partly from memory)."
    )
    return Finding("read speed", "ok", f"{rate / 1e6:,.0f} MB/s", meaning)


def _parts() -> list[bytes]:
    """THROUGHPUT_BYTES of data that does not compress, in 16 parts that differ."""
    block = random.Random(0).randbytes(THROUGHPUT_BYTES // 16 - 1)
    return [bytes([number]) + block for number in range(16)]


TRIALS = (fsync_file, fsync_directory, hard_link, clock, new_file_mode, long_name, write_speed, read_speed)

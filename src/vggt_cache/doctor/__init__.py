"""Examines a directory on the user's own mount, or a place in a bucket: is it fit to hold a feature cache?

The store itself commits, reads and claims there, with a second process beside it, in a temporary folder that is
removed again; nothing else in the directory is touched.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from vggt_cache.doctor import trials
from vggt_cache.doctor.bucket import examine_bucket
from vggt_cache.doctor.findings import Finding, finding, format_findings, reason
from vggt_cache.errors import CacheAccessError, CommitError, os_errors_as
from vggt_cache.place import absolute, is_url

__all__ = ["Finding", "examine", "format_findings"]

LOW_SPACE_BYTES, NO_SPACE_BYTES = 20 * 10**9, 200 * 10**6
LOW_INODES = 1000
_MOUNT_KINDS = (
    ("ext2 ext3 ext4 xfs btrfs zfs f2fs apfs", "ok", "a local disk: other machines cannot see a cache here"),
    ("nfs nfs4", "ok",
     "a network file system: other machines see a new shard when they next open or refresh the cache, and a training "
     "job should start after precompute has ended"),
    ("lustre gpfs beegfs ceph wekafs", "ok",
     "a cluster file system: all nodes see a commit at once, and many small files are slow, which shards avoid"),
    ("tmpfs ramfs", "warn", "main memory: a cache here takes RAM and is lost when the machine restarts"),
    ("overlay", "warn", "the container's own layer: a cache here is lost with the container, so mount a volume for it"),
    ("cifs smb3 9p vfat exfat", "warn",
     "a file system with weak POSIX promises: prefer a local disk, NFS or a cluster file system"),
    ("fuse", "warn",
     "a file system in user space: whether fsync really reaches the disk depends on the program behind it"),
)  # fmt: skip


def examine(directory: str | os.PathLike[str]) -> list[Finding]:
    """All findings about a directory: a cache, an empty directory, or one that does not exist yet.

    In the last case its nearest existing parent is examined. A read-only directory is no fault: the checks
    that need to write are left out, and a finding says so. Raises CacheAccessError if the directory is none or
    cannot be read.
    """
    if is_url(directory):
        return examine_bucket(absolute(directory))
    asked = Path(directory)
    place = _nearest_readable(asked)
    findings = [] if place == asked else [finding("directory", "ok", str(place), asked=asked)]
    findings += [*_attempt(file_system, place), *_attempt(directory_mode, place)]
    try:
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    except OSError as error:
        return [*findings, finding("writable", "warn", f"no ({reason(error)})")]
    findings += [finding("writable", "ok", "yes"), *_attempt(room, place)]
    try:
        findings += _tried_together(folder)
        for trial in trials.ALONE:
            findings += _attempt(trial, _fresh(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        findings.append(finding("cleaning up", "warn", str(folder)))
    return findings


def _nearest_readable(asked: Path) -> Path:
    no_use = (
        ", so a cache there could not be used: ask its owner for read access (chmod g+rx), or check the mount"
    )
    for place in (asked, *asked.absolute().parents):
        absent = suppress(FileNotFoundError, NotADirectoryError)
        with os_errors_as(CacheAccessError, f"{place} cannot be read", no_use), absent:
            if not stat.S_ISDIR(os.stat(place).st_mode):
                fault = f"{place} is not a directory, so no cache can be there: give a directory"
                raise CacheAccessError(fault)
            with os.scandir(place) as entries:
                next(entries, None)
            return place
        if place.is_symlink():
            fault = (
                f"{place} is a link that leads nowhere (to {os.readlink(place)}), so no cache can be there"
            )
            raise CacheAccessError(f"{fault}: name another place, or remove it")
    return Path("/")


def _tried_together(folder: Path) -> list[Finding]:
    try:
        with trials.Partner() as partner:
            found = [_attempt(trial, _fresh(folder), partner) for trial in trials.TOGETHER]
    except OSError as error:
        return [finding("second process", "fail", reason(error))]
    return [*chain.from_iterable(found)]


def _fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def _attempt(trial: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """What a trial finds; a refusal of the operating system is a finding too."""
    findings: list[Finding] = []
    try:
        found = trial(*arguments)
        findings.extend([found] if isinstance(found, Finding) else found)
    except (OSError, ValueError, CacheAccessError, CommitError) as error:
        findings.append(finding(trial.__name__.replace("_", " "), "fail", reason(error), case="any: refused"))
    return findings


def file_system(directory: Path, mounts: str = "/proc/mounts") -> Finding:
    """Type and mount point of the file system that holds the directory."""
    kind, point = mount_of(directory, mounts)
    family = "fuse" if kind.startswith("fuse") else kind
    known = ((status, meaning) for kinds, status, meaning in _MOUNT_KINDS if family in kinds.split())
    status, meaning = next(known, ("ok", "a type that this check does not know"))
    return Finding("file system", status, f"{kind} at {point}", f"It is {meaning}.")


def mount_of(directory: Path, mounts: str = "/proc/mounts") -> tuple[str, str]:
    """(type, mount point) by the longest mount point that contains the directory; ("unknown", "/") without a table."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown", "/"
    real, best = Path(os.path.realpath(directory)), ("unknown", "/")
    for line in lines:
        _, escaped, kind, *_ = [*line.split(), "", "", ""]
        # The kernel writes blanks, tabs, line feeds and backslashes as \040 and the like.
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), escaped)
        # Of two mounts on one point the later one hides the earlier one.
        if point.startswith("/") and real.is_relative_to(point) and len(point) >= len(best[1]):
            best = (kind, point)
    return best


def directory_mode(directory: Path) -> Finding:
    """Who can enter the directory."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    return finding("directory mode", "ok" if mode & 0o050 == 0o050 else "warn", f"{mode:04o}")


def room(directory: Path) -> Iterator[Finding]:
    """Bytes that an ordinary user can still write, and files that can still be created."""
    found = os.statvfs(directory)
    free_bytes = found.f_bavail * found.f_frsize
    status = "fail" if free_bytes < NO_SPACE_BYTES else "warn" if free_bytes < LOW_SPACE_BYTES else "ok"
    remedy = "" if status == "ok" else ": free some space or choose another file system"
    features = int(free_bytes / trials.FEATURE_BYTES)
    value = f"{free_bytes / 1e9:.1f} GB"
    yield finding("free space", status, value, case="free space: room", features=features, remedy=remedy)
    if found.f_files == 0:
        yield finding("free inodes", "ok", "no limit", case="free inodes: no limit")
    else:
        status = "fail" if found.f_favail < LOW_INODES else "ok"
        yield finding("free inodes", status, f"{found.f_favail:,}")

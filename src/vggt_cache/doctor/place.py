"""What can be said about a directory without writing to it."""

from __future__ import annotations

import os
from pathlib import Path

from vggt_cache.doctor.findings import Finding

LOW_SPACE_BYTES = 20 * 10**9
NO_SPACE_BYTES = 200 * 10**6
LOW_INODES = 1000
FEATURE_BYTES = 4.24e6
"""A feature of VGGT-1B in bfloat16 at 518 x 392 pixels."""

_LOCAL = "a local disk: other machines cannot see a cache here"
_CLUSTER = (
    "a cluster file system: all nodes see a commit at once, and many small files are slow, which shards avoid"
)
_NFS = (
    "a network file system: other machines see a new shard only after their attribute cache expires "
    "(3 to 60 s, mount option actimeo), and a training job should start after precompute has ended"
)
_FUSE = "a file system in user space: whether fsync really reaches the disk depends on the program behind it"
MEANINGS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "apfs"), ("ok", _LOCAL)),
    **dict.fromkeys(("nfs", "nfs4"), ("ok", _NFS)),
    **dict.fromkeys(("lustre", "gpfs", "beegfs", "ceph", "wekafs"), ("ok", _CLUSTER)),
    **dict.fromkeys(
        ("tmpfs", "ramfs"),
        ("warn", "main memory: a cache here takes RAM and is lost when the machine restarts"),
    ),
    "overlay": (
        "warn",
        "the container's own layer: a cache here is lost with the container, so mount a volume for it",
    ),
    **dict.fromkeys(
        ("cifs", "smb3", "9p", "vfat", "exfat"),
        ("warn", "a file system with weak POSIX promises: prefer a local disk, NFS or a cluster file system"),
    ),
}


def file_system(directory: Path, mounts: str = "/proc/mounts") -> Finding:
    """Type and mount point of the file system that holds the directory."""
    kind, point = mount_of(directory, mounts)
    default = ("warn", _FUSE) if kind.startswith("fuse") else ("ok", "a type that this check does not know")
    status, meaning = MEANINGS.get(kind, default)
    return Finding("file system", status, f"{kind} at {point}", f"It is {meaning}.")


def mount_of(directory: Path, mounts: str = "/proc/mounts") -> tuple[str, str]:
    """(type, mount point) by the longest mount point that contains the directory; ("unknown", "/") without a table."""
    try:
        lines = Path(mounts).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return "unknown", "/"
    real = Path(os.path.realpath(directory))
    best = ("unknown", "/")
    for line in lines:
        _, point, kind, *_ = [*line.split(), "", "", ""]
        point = _unescaped(point)
        # Of two mounts on one point the later one hides the earlier one.
        if point.startswith("/") and real.is_relative_to(point) and len(point) >= len(best[1]):
            best = (kind, point)
    return best


def _unescaped(point: str) -> str:
    r"""A mount point as it is: the kernel writes blanks, tabs, line feeds and backslashes as \040 and the like."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(code, character)
    return point


def free_space(directory: Path) -> Finding:
    """Bytes that an ordinary user can still write."""
    stat = os.statvfs(directory)
    free_bytes = stat.f_bavail * stat.f_frsize
    features = int(free_bytes / FEATURE_BYTES)
    meaning = f"There is room for about {features:,} features of 4.2 MB (VGGT-1B, bfloat16, 518 pixels wide)"
    status = "fail" if free_bytes < NO_SPACE_BYTES else "warn" if free_bytes < LOW_SPACE_BYTES else "ok"
    remedy = "" if status == "ok" else ": free some space or choose another file system"
    return Finding("free space", status, f"{free_bytes / 1e9:.1f} GB", f"{meaning}{remedy}.")


def free_inodes(directory: Path) -> Finding:
    """Files that can still be created."""
    stat = os.statvfs(directory)
    if stat.f_files == 0:
        return Finding("free inodes", "ok", "no limit", "The file system does not limit the number of files.")
    if stat.f_favail < LOW_INODES:
        meaning = (
            "Hardly any file can be created, whatever the free bytes: remove files or ask for more inodes."
        )
        return Finding("free inodes", "fail", f"{stat.f_favail:,}", meaning)
    return Finding(
        "free inodes", "ok", f"{stat.f_favail:,}", "A cache needs few: one for each shard of many features."
    )


def access(directory: Path) -> Finding:
    """Who can enter the directory."""
    mode = os.stat(directory).st_mode & 0o7777
    group = mode & 0o050 == 0o050
    meaning = (
        "Other members of the group can enter it and read a cache in it."
        if group
        else "Other members of the group cannot enter it: for a shared cache, chmod g+rx it."
    )
    return Finding("directory mode", "ok" if group else "warn", f"{mode:04o}", meaning)

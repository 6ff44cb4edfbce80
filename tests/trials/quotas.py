"""Trials on a real file system whose user has no quota left.

The quota is a little larger with every seed, so that one operation after the other is the one that is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path

from store_kit import write_shard
from trials.full_disk import PAGE_BYTES, fill
from trials.mounts import make_image, mounted, run
from trials.registry import Unavailable

KIB = 1024
EXT4_BYTES = 4 * KIB * KIB
BTRFS_BYTES = 128 * KIB * KIB
"""A btrfs cannot be smaller; its file has holes."""
USER = 64_123
"""Root is above ext4's quotas, so somebody else writes. The number needs no entry in the list of users."""
REFUSAL = "quota is used up"


def quota_ext4(seed: int, folder: Path) -> int:
    """A user's quota on an ext4: with even seeds of space, with odd ones of files. Takes the package quota."""
    amounts = count(3 + seed // 2 % 40, 20) if seed % 2 else count(4 + seed // 2 % 160, 160)
    with _ext4_with_quotas(folder) as disk:
        os.chown(disk, USER, USER)
        write_shard(folder / "root", [1])  # imports what is imported late, which the user may not be able to
        folder.chmod(0o755)

        def give_space() -> None:
            most = str(next(amounts))
            space_kib, files = ("0", most) if seed % 2 else (most, "0")
            with _user(0):
                run("setquota", "-u", str(USER), "0", space_kib, "0", files, str(disk))

        give_space()
        with _as_user(disk):
            fill(disk, seed, REFUSAL, give_space)
    return 1


@contextmanager
def _ext4_with_quotas(folder: Path) -> Iterator[Path]:
    image = folder / "image"
    make_image(image, EXT4_BYTES, "mkfs.ext4", "-q", "-F", "-m", "0", "-O", "quota")
    with ExitStack() as stack:
        options = ("-t", "ext4", "-o", "loop,usrquota", str(image))
        try:
            disk = stack.enter_context(mounted(folder / "disk", EXT4_BYTES, *options))
        except Unavailable as error:
            raise Unavailable(
                "no ext4 with quotas can be mounted: the kernel lacks them (CONFIG_QFMT_V2), or this is not root"
            ) from error
        yield disk


@contextmanager
def _as_user(disk: Path) -> Iterator[None]:
    with _user(USER):
        if not os.access(disk, os.W_OK, effective_ids=True):
            raise Unavailable(f"another user cannot reach {disk}: give another --folder")
        yield


@contextmanager
def _user(number: int) -> Iterator[None]:
    """Act as this user and not as root, or the other way round."""
    before = os.geteuid()
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(before)


def quota_btrfs(seed: int, folder: Path) -> int:
    """A quota on a subvolume of a btrfs, which holds for root too. Takes the package btrfs-progs."""
    make_image(folder / "image", BTRFS_BYTES, "mkfs.btrfs", "-q")
    with mounted(folder / "disk", BTRFS_BYTES, "-t", "btrfs", "-o", "loop", str(folder / "image")) as disk:
        volume = disk / "volume"
        run("btrfs", "quota", "enable", str(disk))
        run("btrfs", "subvolume", "create", str(volume))
        amounts = count(64 * KIB + seed % 64 * PAGE_BYTES, 256 * KIB)

        def give_space() -> None:
            run("btrfs", "qgroup", "limit", str(next(amounts)), str(volume))

        give_space()
        fill(volume, seed, REFUSAL, give_space)
    return 1

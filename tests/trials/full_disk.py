"""Trials on a real file system that is full: a tmpfs or an ext4 of a few pages."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from store_kit import equal, make_feature, make_key, make_spec, temp_files
from trials.registry import Unavailable
from vggt_cache.errors import CommitError
from vggt_cache.store import FeatureCache, ShardWriter, create_store

PAGE_BYTES = 4096
SPEC = make_spec(embed_dim=256)
EXT4_BYTES = 1024 * 1024


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"{command[0]} is not installed") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def _mounted(mount: Path, most_bytes: int, *command: str) -> Iterator[Path]:
    mount.mkdir()
    _run("mount", *command, str(mount))
    try:
        # Filling is allowed only when this really is the small file system that was asked for.
        status = os.statvfs(mount)
        assert os.path.ismount(mount)
        assert status.f_blocks * status.f_frsize <= most_bytes
        yield mount
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def full_tmpfs(seed: int, folder: Path) -> int:
    """A tmpfs one page larger with every seed, so that each operation in turn is the one without space."""
    size = (8 + seed % 160) * PAGE_BYTES
    with _mounted(folder / "disk", size, "-t", "tmpfs", "-o", f"size={size}", "none") as disk:
        _fill(disk, seed)
    return 1


def full_ext4(seed: int, folder: Path) -> int:
    """An ext4 of 1 MiB in a file."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(EXT4_BYTES)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", str(image))
    with _mounted(folder / "disk", EXT4_BYTES, "-o", "loop", str(image)) as disk:
        _fill(disk, seed)
    return 1


def _fill(disk: Path, seed: int) -> None:
    """Write until the disk is full; then nothing is lost or left over, and with space again writing goes on."""
    random, committed = Random(seed), dict[int, int]()
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(PAGE_BYTES * 6))
    try:
        create_store(disk, SPEC)
    except CommitError:
        ballast.unlink()
        create_store(disk, SPEC)
    refusal = ""
    for _ in range(500):
        try:
            committed.update(_commit(disk, random))
        except CommitError as error:
            refusal = str(error)
            break
    assert "the disk is full" in refusal
    _check(disk, committed)
    ballast.unlink(missing_ok=True)
    committed.update(_commit(disk, Random(0), most=1))
    _check(disk, committed)


def _commit(disk: Path, random: Random, most: int = 4) -> dict[int, int]:
    """Commit a shard; returns the width of each of its features."""
    chosen = {random.randrange(1000): random.randint(1, 3) for _ in range(random.randint(1, most))}
    with ShardWriter(disk / SPEC.short_name, SPEC, max_records=4) as writer:
        for number, width in chosen.items():
            writer.append(make_key(number), make_feature(number, SPEC, 1, width))
        writer.commit()
    return chosen


def _check(disk: Path, committed: dict[int, int]) -> None:
    assert temp_files(disk) == []
    with FeatureCache.open(disk) as cache:
        assert set(cache) == set(map(make_key, committed))
        for number, width in committed.items():
            assert equal(cache.get_by_key(make_key(number)), make_feature(number, SPEC, 1, width))

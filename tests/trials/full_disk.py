"""Trials on a real file system that is full: a tmpfs or an ext4 of a few pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

from store_kit import equal, make_feature, make_key, make_spec, temp_files
from trials.mounts import make_image, mounted
from vggt_cache.errors import CommitError
from vggt_cache.store import FeatureCache, ShardWriter, create_store

PAGE_BYTES = 4096
SPEC = make_spec(embed_dim=256)
EXT4_BYTES = 1024 * 1024


def full_tmpfs(seed: int, folder: Path) -> int:
    """A tmpfs one page larger with every seed, so that each operation in turn is the one without space."""
    size = (8 + seed % 160) * PAGE_BYTES
    with mounted(folder / "disk", size, "-t", "tmpfs", "-o", f"size={size}", "none") as disk:
        _fill_beside_ballast(disk, seed)
    return 1


def full_ext4(seed: int, folder: Path) -> int:
    """An ext4 of 1 MiB in a file."""
    image = folder / "image"
    make_image(image, EXT4_BYTES, "mkfs.ext4", "-q", "-F", "-m", "0")
    with mounted(folder / "disk", EXT4_BYTES, "-o", "loop", str(image)) as disk:
        _fill_beside_ballast(disk, seed)
    return 1


def _fill_beside_ballast(disk: Path, seed: int) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(PAGE_BYTES * 6))
    fill(disk, seed, "the disk is full", lambda: ballast.unlink(missing_ok=True))


def fill(disk: Path, seed: int, refusal: str, give_space: Callable[[], None]) -> None:
    """Write until it is refused; then nothing is lost or left over, and with space again writing goes on."""
    random, committed = Random(seed), dict[int, int]()
    try:
        create_store(disk, SPEC)
    except CommitError:
        give_space()
        create_store(disk, SPEC)
    said = ""
    for _ in range(500):
        try:
            committed.update(_commit(disk, random))
        except CommitError as error:
            said = str(error)
            break
    assert refusal in said, f"the refusal was {said!r}"
    _check(disk, committed)
    give_space()
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

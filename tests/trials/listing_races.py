"""Trials in which a store is listed while `prune` and `convert` replace its shards, on a real directory.

A directory is read in pieces: of what is committed and removed between two of them a listing may show neither. Here
the reader's listing stands still at a random place, other clients replace shards, and the listing goes on, as the
kernel gives it. Names that are no shards make it longer than the pieces.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from store_kit import SPEC, equal, make_feature, make_key, save_index, shards_dir, write_shard
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache, FileSystem, convert, prune

OPENINGS = 10
KEYS = range(6)
BYSTANDERS = 400
"""Names of 200 characters: several times what one system call gives of a directory."""


class Hasty(FileSystem):
    """Power is not lost here, so nobody waits for the disk."""

    def fsync(self, fd: int) -> None: ...

    def fsync_directory(self, dir_fd: int) -> None: ...


class InterruptedListing(Hasty):
    """Other clients are at work while it lists shards."""

    def __init__(self, replacer: Replacer, random: Random) -> None:
        self._replacer = replacer
        self._random = random

    def list_names(self, dir_fd: int) -> list[str]:
        own = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=dir_fd)
        try:
            with os.scandir(own) as entries:
                return list(self._interrupted(entry.name for entry in entries))
        finally:
            os.close(own)

    def _interrupted(self, names: Iterator[str]) -> Iterator[str]:
        # Not after the first listing of a question only: asked again, the answer may be incomplete again.
        places = {self._random.randrange(BYSTANDERS) for _ in range(self._random.choice((0, 1, 1, 1, 2)))}
        for number, name in enumerate(names):
            yield name
            if number in places:
                self._replacer.work()


class Replacer:
    """Commits all keys anew and removes what that supersedes."""

    def __init__(self, cache_dir: Path, random: Random) -> None:
        self._cache_dir = cache_dir
        self._random = random

    def work(self) -> None:
        for _ in range(self._random.choice((1, 1, 2, 3))):
            self.commit()
            prune(self._cache_dir, dry_run=False, fs=Hasty())
        if self._random.random() < 0.25:
            codec = self._random.choice(("none", "lossless"))
            list(convert(self._cache_dir, SPEC, codec, dry_run=False, fs=Hasty()))

    def commit(self) -> None:
        """In one shard or in several."""
        size = self._random.choice((1, 2, len(KEYS), len(KEYS)))
        for start in range(0, len(KEYS), size):
            write_shard(self._cache_dir, KEYS[start : start + size], fs=Hasty())


def listed_while_replaced(seed: int, folder: Path, *, openings: int = OPENINGS) -> int:
    """Each opening and each refresh finds every feature, whatever its listing saw."""
    random = Random(seed)
    replacer = Replacer(folder, random)
    replacer.commit()
    for number in range(BYSTANDERS):
        (shards_dir(folder) / f"{number:0200}").touch()
    if seed % 2:
        save_index(folder)
    for _ in range(openings):
        fs = InterruptedListing(replacer, random)
        with FeatureCache.open(folder, fs=fs) as cache:
            check(cache)
            cache.refresh()
            check(cache)
    return 2 * openings


def check(cache: FeatureCache) -> None:
    lost = [number for number in KEYS if make_key(number) not in cache]
    assert not lost, f"{lost} are committed and were not found in {cache.shard_names()}"
    assert cache.damaged_shards == ()
    for number in KEYS:
        with suppress(CacheAccessError):  # its shard was removed since
            assert equal(cache.get_by_key(make_key(number)), make_feature(number))

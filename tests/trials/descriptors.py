"""A trial with many shards and few descriptors."""

from __future__ import annotations

import os
import resource
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

from torch import Tensor

from store_kit import SPEC, equal, make_feature, make_key, open_descriptors, save_index
from trials.children import Child
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store

SHARDS = 5000
DESCRIPTORS = 64
THREADS = 4
LOOK_EVERY_S = 0.05
REFRESH_EVERY = 500


class NothingSynced(FileSystem):
    """Makes thousands of shards quickly: whether they survive a power loss is not what is tried here."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_directory(self, dir_fd: int) -> None:
        pass


def descriptors(seed: int, folder: Path, *, shards: int = SHARDS) -> int:
    """Every feature of 5,000 shards is read, from several threads, by a process that may have 64 descriptors."""
    _write(folder, shards)
    for indexed in (False, True):
        if indexed:
            save_index(folder)
        with Child(partial(_read, seed, folder, shards), folder / "log") as child:
            while child.wait(LOOK_EVERY_S):
                _look(child.pid, folder)
            child.well()
    return 1


def _look(process: int, folder: Path) -> None:
    """From outside: the process may have no descriptor left to look at itself with."""
    with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
        assert len(os.listdir(f"/proc/{process}/fd")) <= DESCRIPTORS
        assert str(folder) not in Path(f"/proc/{process}/maps").read_text(), "a file of the cache is mapped"


def _write(folder: Path, shards: int) -> None:
    fs = NothingSynced()
    store_dir = create_store(folder, SPEC, fs)
    for number in range(shards):
        with ShardWriter(store_dir, SPEC, max_records=1, fs=fs) as writer:
            writer.append(make_key(number), make_feature(number))
            writer.commit()


def _read(seed: int, folder: Path, shards: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    before, features = open_descriptors(), [make_feature(number) for number in range(shards)]
    with FeatureCache.open(folder) as cache:
        assert len(cache) == len(cache.shard_names()) == shards
        numbers = list(range(shards))
        Random(seed).shuffle(numbers)
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda part: _read_part(cache, features, numbers[part::THREADS]), range(THREADS)))
    assert open_descriptors() == before


def _read_part(cache: FeatureCache, features: list[Tensor], numbers: list[int]) -> None:
    for position, number in enumerate(numbers):
        assert equal(cache.get_by_key(make_key(number)), features[number]), f"number {number} is wrong"
        if position % REFRESH_EVERY == 0:
            cache.refresh()

"""Trials with real processes on a real file system: killed, racing, forked, spawned."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random

import torch

from store_kit import SPEC, equal, make_feature, make_key, save_index, shards_dir, write_shard
from test_store_processes import FEATURES, child, finish, read_all, write_for_ever
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store, prune

ROUNDS = 20
READS = 2000
SPAWNED_READS = 25_000


# ---------------------------------------------------------------- killed


def kill_writers(seed: int, folder: Path) -> int:
    """Two writers, and at times a pruner, killed at random times; 40 kills of writers in one store."""
    create_store(folder, SPEC)
    random = Random(seed)
    acknowledged: set[int] = set()
    with FeatureCache.open(folder) as reader:
        for number in range(ROUNDS):
            acknowledged |= _kill_round(folder, random, seed * ROUNDS + number)
            _check_round(reader, acknowledged)
    with FeatureCache.open(folder, use_index=False) as cache:
        assert cache.damaged_shards == ()
        assert all(cache.verify_record(key) for key in cache)
    return 2 * ROUNDS


def _kill_round(folder: Path, random: Random, seed: int) -> set[int]:
    """Numbers that were acknowledged before the kill."""
    with (
        child(lambda fd: write_for_ever(folder, 2 * seed, fd)) as (first, from_first),
        child(lambda fd: write_for_ever(folder, 2 * seed + 1, fd)) as (second, from_second),
        child(lambda fd: _prune_for_ever(folder, random.random() < 0.3)) as (third, _),
    ):
        time.sleep(random.uniform(0.0, 0.06))
        for process in (first, second, third):
            os.kill(process, signal.SIGKILL)
        assert {finish(process) for process in (first, second, third)} == {-signal.SIGKILL}
        return {*read_all(from_first), *read_all(from_second)}


def _prune_for_ever(folder: Path, really: bool) -> None:
    while True:
        time.sleep(0.005)
        if really:
            prune(folder, dry_run=False, damaged=True)


def _check_round(reader: FeatureCache, acknowledged: set[int]) -> None:
    before = set(reader.shard_names())
    reader.refresh()
    gone = before - set(reader.shard_names())
    present = set(os.listdir(shards_dir(Path(reader.cache_dir))))
    assert not gone & present, f"the snapshot forgot {gone & present}"
    for number in acknowledged:
        assert equal(reader.get_by_key(make_key(number)), FEATURES[number]), f"number {number} is lost"


# ---------------------------------------------------------------- racing


class NoLocks(FileSystem):
    """Where flock says yes to everybody."""

    def try_lock(self, fd: int) -> bool:
        return True


def race(seed: int, folder: Path) -> int:
    """2 to 16 writers of the same keys start at once, while two readers read; locks say yes to everybody."""
    random = Random(seed)
    store_dir, count = create_store(folder, SPEC), random.randint(2, 16)
    reading, starting = os.pipe()
    bodies: list[Callable[[], None]] = [
        partial(_write_racing, store_dir, number, reading, starting) for number in range(count)
    ]
    bodies += [lambda: _read_racing(folder, count, starting)] * 2
    processes = [_fork(body) for body in bodies]
    os.close(reading)
    os.close(starting)  # all of them see the end of the pipe at once
    assert [finish(process) for process in processes] == [0] * len(processes)
    assert len(os.listdir(shards_dir(folder))) == 2 * count
    winners = _winners(folder)
    assert winners == _winners(folder)
    save_index(folder)
    assert winners == _winners(folder)
    return 1


def _fork(body: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return process


def _write_racing(store_dir: Path, number: int, reading: int, starting: int) -> None:
    os.close(starting)
    os.read(reading, 1)
    for _ in range(2):
        with ShardWriter(store_dir, SPEC, max_records=4, fs=NoLocks()) as writer:
            for key in range(4):
                writer.append(make_key(key), torch.full((2, 3, 4), float(number), dtype=torch.bfloat16))
            writer.commit()


def _read_racing(folder: Path, writers: int, starting: int) -> None:
    os.close(starting)
    with FeatureCache.open(folder, fs=NoLocks()) as cache:
        while len(cache.shard_names()) < 2 * writers:
            seen = set(cache.shard_names())
            cache.refresh()
            assert seen <= set(cache.shard_names())
            for key in range(4):
                feature = cache.get_by_key(make_key(key))
                assert feature is None or feature.unique().numel() == 1


def _winners(folder: Path) -> list[tuple[str | None, float]]:
    with FeatureCache.open(folder) as cache:
        found = [(cache.shard_of(make_key(key)), cache.get_by_key(make_key(key))) for key in range(4)]
        assert {shard for shard, _ in found} == {cache.shard_names()[-1]}
        return [(shard, float(feature[0, 0, 0])) for shard, feature in found if feature is not None]


# ---------------------------------------------------------------- reading


def _fill(folder: Path) -> None:
    for shard in range(20):
        write_shard(folder, range(shard * 3, shard * 3 + 3), max_records=3)


def _read_at_random(cache: FeatureCache, seed: int, count: int) -> None:
    random, wanted = Random(seed), [make_feature(number) for number in range(60)]
    for _ in range(count):
        number = random.randrange(60)
        assert equal(cache.get_by_key(make_key(number)), wanted[number])


def read_forked(seed: int, folder: Path) -> int:
    """4 to 16 processes forked from one that has the cache open; every read is compared bit by bit."""
    random = Random(seed)
    _fill(folder)
    if seed % 2:
        save_index(folder)
    with FeatureCache.open(folder) as cache:
        count = random.randint(4, 16)
        processes = [_fork(partial(_read_at_random, cache, seed * 16 + n, READS)) for n in range(count)]
        assert [finish(process) for process in processes] == [0] * count
    return count * READS


def read_spawned(seed: int, folder: Path) -> int:
    """4 processes started with spawn, which get the open cache sent."""
    _fill(folder)
    if seed % 2:
        save_index(folder)
    context = get_context("spawn")
    with FeatureCache.open(folder) as cache:
        arguments = [(cache, seed * 16 + number, SPAWNED_READS) for number in range(4)]
        processes = [context.Process(target=_read_at_random, args=one) for one in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    return 4 * SPAWNED_READS

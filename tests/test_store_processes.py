"""Several processes on one store: killed, racing, forked, spawned, short of descriptors."""

from __future__ import annotations

import gc
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from store_kit import (
    SPEC,
    equal,
    holds,
    make_feature,
    make_key,
    no_descriptor_leaks,
    open_descriptors,
    save_index,
    shard_path,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache, ShardWriter, create_store
from vggt_cache.store.filesystem import OPERATING_SYSTEM

FEATURES = [make_feature(number) for number in range(64)]


@contextmanager
def child(body: Callable[[int], None]) -> Iterator[tuple[int, int]]:
    """A forked process that runs `body(writing end of a pipe)`; gives its id and the reading end."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        status = 1
        try:
            os.close(reading)
            body(writing)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    try:
        yield process, reading
    finally:
        os.close(reading)


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def read_all(fd: int) -> bytes:
    return b"".join(iter(lambda: os.read(fd, 65536), b""))


# ---------------------------------------------------------------- kill


def write_for_ever(cache_dir: Path, seed: int, acknowledge: int) -> None:
    """Commit shards of 1 to 4 features; after each commit tell which features it had. Saves the index now and then."""
    chooser = random.Random(seed)
    store_dir = cache_dir / SPEC.short_name
    while True:
        numbers = chooser.sample(range(64), chooser.randint(1, 4))
        with ShardWriter(store_dir, SPEC, max_records=4) as writer:
            for number in numbers:
                writer.append(make_key(number), FEATURES[number])
            writer.commit()
        os.write(acknowledge, bytes(numbers))
        if chooser.random() < 0.2:
            with FeatureCache.open(cache_dir) as cache:
                cache.save_index()


@pytest.mark.promise("committed survives", "Never torn")
def test_a_hundred_writers_killed_at_random_lose_nothing_and_tear_nothing(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    chooser = random.Random(11)
    acknowledged: set[int] = set()
    with FeatureCache.open(tmp_path) as reader:
        for trial in range(50):
            with (
                child(lambda fd, seed=2 * trial: write_for_ever(tmp_path, seed, fd)) as (first, from_first),  # type: ignore[misc]
                child(lambda fd, seed=2 * trial + 1: write_for_ever(tmp_path, seed, fd)) as (
                    second,
                    from_second,
                ),  # type: ignore[misc]
            ):
                time.sleep(chooser.uniform(0.0, 0.12))
                for process in (first, second):
                    os.kill(process, signal.SIGKILL)
                assert finish(first) == finish(second) == -signal.SIGKILL
                acknowledged.update(read_all(from_first), read_all(from_second))
            before = set(reader.shard_names())
            reader.refresh()
            assert before <= set(reader.shard_names())
            assert all(number_is_intact(reader, number) for number in acknowledged)
    assert len(acknowledged) > 16, "too few commits to mean anything"
    assert temp_files(tmp_path), "no kill came in the middle of a commit"
    with FeatureCache.open(tmp_path, use_index=False) as cache:
        assert cache.damaged_shards == ()
        assert all(cache.verify_record(key) for key in cache)
    write_shard(tmp_path, range(64))
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(64))


def number_is_intact(cache: FeatureCache, number: int) -> bool:
    return equal(cache.get_by_key(make_key(number)), FEATURES[number])


# ---------------------------------------------------------------- at the same time


@pytest.mark.promise("Never torn")
def test_a_reader_sees_whole_shards_only_and_only_more_of_them_while_another_writes(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)

    def write(fd: int) -> None:
        for number in range(40):
            write_shard(tmp_path, [number, (number + 20) % 40], max_records=2)
            time.sleep(0.002)
            if number % 7 == 0:
                save_index(tmp_path)

    with child(write) as (process, _), FeatureCache.open(tmp_path) as cache:
        count, rounds, running = 0, 0, True
        while running:
            running = os.waitpid(process, os.WNOHANG) == (0, 0)
            cache.refresh()
            keys = list(cache.keys())
            assert len(keys) >= count
            count, rounds = len(keys), rounds + 1
            present = [number for number in range(40) if make_key(number) in cache]
            assert all(number_is_intact(cache, number) for number in present)
            assert len(present) == len(keys)
        assert holds(cache, range(40))
        assert rounds > 1


@pytest.mark.promise("one snapshot")
def test_a_snapshot_does_not_change_until_it_is_refreshed(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    with FeatureCache.open(tmp_path) as cache:
        snapshot = cache.snapshot
        write_shard(tmp_path, range(2, 6))
        save_index(tmp_path)
        assert holds(cache, range(3))
        assert cache.snapshot == snapshot
        assert cache.shard_of(make_key(2)) == cache.shard_names()[0]
        cache.refresh()
        assert holds(cache, range(6))
        assert cache.snapshot != snapshot


@pytest.mark.promise("shards never change")
def test_of_two_racing_writers_of_one_key_both_commit_and_all_readers_agree_on_the_winner(
    tmp_path: Path,
) -> None:
    """Their features differ, so that it shows who won."""
    store_dir = create_store(tmp_path, SPEC)
    context = get_context("fork")
    barrier = context.Barrier(2)

    def race(writer_number: int) -> None:
        for key in range(8):
            with ShardWriter(store_dir, SPEC, max_records=1) as writer:
                writer.append(
                    make_key(key), torch.full((2, 3, 4), float(writer_number), dtype=torch.bfloat16)
                )
                barrier.wait()
                writer.commit()

    writers = [context.Process(target=race, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert len(os.listdir(shards_dir(tmp_path))) == 16

    def winners() -> list[tuple[str | None, float]]:
        with FeatureCache.open(tmp_path) as cache:
            assert len(cache) == 8
            found = [(cache.shard_of(make_key(key)), cache.get_by_key(make_key(key))) for key in range(8)]
            return [(shard, float(feature[0, 0, 0])) for shard, feature in found if feature is not None]

    expected = winners()
    for key, (shard, value) in enumerate(expected):
        with FeatureCache.open(tmp_path) as cache:
            holders = [name for name, _ in cache.copies_of(make_key(key))]
        assert shard == max(holders)
        assert len(holders) == 2
        assert value in (1.0, 2.0)
    save_index(tmp_path)
    assert winners() == expected
    with get_context("fork").Pool(2) as pool:
        assert pool.apply(_winners, [tmp_path]) == [shard for shard, _ in expected]


def _winners(cache_dir: Path) -> list[str | None]:
    with FeatureCache.open(cache_dir) as cache:
        return [cache.shard_of(make_key(key)) for key in range(8)]


# ---------------------------------------------------------------- fork, spawn, threads


def fill(cache_dir: Path, shards: int) -> None:
    for shard in range(shards):
        write_shard(cache_dir, range(shard * 3, shard * 3 + 3), max_records=3)


@pytest.mark.promise("fork, spawn and few descriptors")
@pytest.mark.parametrize("indexed", [True, False], ids=["index", "no index"])
def test_forked_readers_share_an_open_cache_without_disturbing_each_other(
    tmp_path: Path, indexed: bool
) -> None:
    fill(tmp_path, 20)
    if indexed:
        save_index(tmp_path)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(60))

        def read(seed: int) -> None:
            chooser = random.Random(seed)
            for step in range(300):
                number = chooser.randrange(62)
                feature = cache.get_by_key(make_key(number))
                assert equal(feature, make_feature(number)) if number < 60 else feature is None
                if step % 25 == 0:
                    cache.refresh()
                    assert len(cache.shard_names()) == 20

        processes = []
        for seed in range(4):
            process = os.fork()
            if process == 0:
                status = 1
                try:
                    read(seed)
                    status = 0
                finally:
                    os._exit(status)
            processes.append(process)
        read(99)
        assert [finish(process) for process in processes] == [0] * 4


def test_forked_processes_that_list_a_directory_through_one_handle_see_all_of_it(tmp_path: Path) -> None:
    names = [f"{number:040d}" for number in range(3000)]
    for name in names:
        (tmp_path / name).touch()
    handle = OPERATING_SYSTEM.open_directory(str(tmp_path))

    def list_often(fd: int = -1) -> None:
        for _ in range(60):
            assert sorted(OPERATING_SYSTEM.list_names(handle)) == names

    try:
        with child(list_often) as (process, _):
            list_often()
            assert finish(process) == 0
    finally:
        os.close(handle)


def test_a_process_forked_while_threads_read_can_read(tmp_path: Path) -> None:
    """Locks may be held, and shards in use, by threads that do not exist in the child."""
    fill(tmp_path, 20)
    stop = threading.Event()
    with FeatureCache.open(tmp_path) as cache:

        def read() -> None:
            chooser = random.Random(0)
            while not stop.is_set():
                cache.get_by_key(make_key(chooser.randrange(60)))

        def read_all_quickly(fd: int) -> None:
            signal.alarm(20)
            assert holds(cache, range(60))
            assert open_descriptors() < 60

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(15):
                with child(read_all_quickly) as (process, _):
                    assert finish(process) == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_lock_that_is_held_at_the_fork_does_not_stop_the_child(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    with FeatureCache.open(tmp_path) as cache:

        def read(fd: int) -> None:
            signal.alarm(10)
            assert holds(cache, range(6))
            cache.refresh()

        with ExitStack() as held:
            for lock in cache.locks:
                held.enter_context(lock)
            process, _ = held.enter_context(child(read))
            assert finish(process) == 0


def _check_in_spawned_process(cache: FeatureCache, snapshot: str, numbers: range) -> bool:
    with cache:
        return cache.snapshot == snapshot and holds(cache, numbers)


@pytest.mark.promise("one snapshot", "fork, spawn and few descriptors")
def test_a_spawned_process_gets_the_same_snapshot(tmp_path: Path) -> None:
    fill(tmp_path, 4)
    save_index(tmp_path)
    write_shard(tmp_path, range(12, 15))
    with FeatureCache.open(tmp_path) as cache:
        write_shard(tmp_path, range(15, 18))
        save_index(tmp_path)
        with get_context("spawn").Pool(1) as pool:
            assert pool.apply(_check_in_spawned_process, (cache, cache.snapshot, range(15)))


def test_threads_read_right_features_although_shards_are_opened_and_closed_all_the_time(
    tmp_path: Path,
) -> None:
    fill(tmp_path, 20)
    with FeatureCache.open(tmp_path) as cache:
        cache.open_shards.limit = 2
        wrong: list[int] = []

        def read(seed: int) -> None:
            chooser = random.Random(seed)
            for _ in range(250):
                number = chooser.randrange(60)
                if not equal(cache.get_by_key(make_key(number)), make_feature(number)):
                    wrong.append(number)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        with no_descriptor_leaks_beyond(2 + 4):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert wrong == []
        assert cache.stats.hits == 1000


@contextmanager
def no_descriptor_leaks_beyond(allowed: int) -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() <= before + allowed


# ---------------------------------------------------------------- descriptors


@pytest.mark.promise("fork, spawn and few descriptors")
def test_many_shards_take_few_descriptors(tmp_path: Path) -> None:
    fill(tmp_path, 90)
    with no_descriptor_leaks():
        before = open_descriptors()
        with FeatureCache.open(tmp_path) as cache:
            assert holds(cache, range(270))
            assert open_descriptors() - before <= 64 + 3


def test_a_process_with_few_descriptors_reads_any_number_of_shards(tmp_path: Path) -> None:
    fill(tmp_path, 40)
    save_index(tmp_path)

    def read(fd: int) -> None:
        used = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, used + 8))
        cache = FeatureCache.open(tmp_path)
        for seed in range(200):
            number = random.Random(seed).randrange(120)
            assert equal(cache.get_by_key(make_key(number)), make_feature(number))
        spare = [os.open("/dev/null", os.O_RDONLY) for _ in range(2)]  # others in the process need some too
        assert holds(cache, range(120))
        assert spare

    with child(read) as (process, _):
        assert finish(process) == 0


def test_a_cache_that_is_dropped_closes_its_files(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    save_index(tmp_path)
    with no_descriptor_leaks():
        cache = FeatureCache.open(tmp_path)
        assert holds(cache, range(9))
        write_shard(tmp_path, [9])
        cache.refresh()
        del cache


def test_a_cache_whose_shard_has_vanished_closes_its_files_when_it_is_dropped(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    new = write_shard(tmp_path, range(2, 5))
    gc.disable()
    try:
        with no_descriptor_leaks():
            cache = FeatureCache.open(tmp_path)
            shard_path(tmp_path, new).unlink()
            assert equal(cache.get_by_key(make_key(2)), make_feature(2))
            with pytest.raises(CacheAccessError):
                cache.get_by_key(make_key(4))
            del cache
    finally:
        gc.enable()


def test_a_shard_removed_under_an_open_cache_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    old = write_shard(tmp_path, range(3))
    new = write_shard(tmp_path, range(2, 5))
    with FeatureCache.open(tmp_path) as cache:
        shard_path(tmp_path, new).unlink()
        assert equal(cache.get_by_key(make_key(2)), make_feature(2)), "the older copy is as good"
        with pytest.raises(CacheAccessError, match=r"call refresh\(\)"):
            cache.get_by_key(make_key(4))
        cache.refresh()
        assert cache.get_by_key(make_key(4)) is None
        assert cache.shard_names() == (old,)

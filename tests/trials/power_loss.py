"""Trials with real processes that lose power: they commit through the kernel onto a disk that forgets.

One seed is one sequence of decisions: what is written, at which request power is lost, what survives. How two
processes interleave, and with them what is under way when power is lost, is the system's. Every commit that a
process could tell of, over a pipe outside of the file system, must be there afterwards.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from simulated_client import Faults
from store_kit import SPEC, make_key
from test_store_processes import child, finish, read_all
from trials.checks import check
from trials.fuse.forgetful_disk import Power, forgetful_disk
from trials.oracle import FEATURES, NUMBERS, VALUES, VARIANTS, Oracle, read_shard
from trials.world import World, seeded_names
from vggt_cache.errors import StoreError
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.filesystem import OPERATING_SYSTEM

LOSSES = 5
"""Power losses of one mounted disk."""
MOST_REQUESTS = 120
"""Power is lost after at most so many requests: three or four commits of one process."""
Chosen = dict[int, int]
"""Which variant of the features of which numbers."""


def fuse_power_names(seed: int, folder: Path) -> int:
    return lose_power(seed, folder, "names")


def fuse_power_data(seed: int, folder: Path) -> int:
    return lose_power(seed, folder, "data")


def lose_power(
    seed: int,
    folder: Path,
    model: str,
    *,
    writer: FileSystem = OPERATING_SYSTEM,
    creator: FileSystem = OPERATING_SYSTEM,
) -> int:
    """Power is lost `LOSSES` times on one disk; everything is checked after each, and the store written to again.

    `writer` and `creator` are what the processes that lose power, and `create_store`, take for the system.
    """
    random = Random(seed)
    with forgetful_disk(folder / "disk") as power:
        world = MountedWorld(seed, folder / "disk", creator)
        for _ in range(LOSSES):
            told = world.write_until_cut(power, random, writer)
            power.restore(random.getrandbits(32), model)
            world.account_for(told)
            check(world)
            world.commit(world.client(), random)
        check(world)
    return LOSSES


# ---------------------------------------------------------------- the processes that lose power


def choices(seed: int) -> Iterator[Chosen]:
    """What a process commits, one shard after the other."""
    random = Random(seed)
    while True:
        numbers = random.sample(NUMBERS, random.randint(1, 4))
        yield {number: random.randrange(VARIANTS) for number in numbers}


def _write_until_cut(cache_dir: str, seed: int, fs: FileSystem, acknowledge: int) -> None:
    """Commit for ever; after each commit tell the name. Save the index now and then."""
    try:
        with seeded_names(Random(seed)):
            for position, chosen in enumerate(choices(seed)):
                os.write(acknowledge, f"{_commit(cache_dir, chosen, fs)}\n".encode())
                if position % 4 == seed % 4:
                    with FeatureCache.open(cache_dir, fs=fs) as cache:
                        cache.save_index()
    except StoreError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EIO:
            raise  # this is not how a disk without power answers


def _commit(cache_dir: str, chosen: Chosen, fs: FileSystem) -> str:
    with ShardWriter(f"{cache_dir}/{SPEC.short_name}", SPEC, max_records=4, fs=fs) as writer:
        for number, variant in chosen.items():
            writer.append(make_key(number), FEATURES[number, variant])
        return writer.commit()


# ---------------------------------------------------------------- the store as the others see it


class _Calm(FileSystem):
    """The operating system, with what `World` wants to know of a client."""

    faults, open_files, dead = Faults(), (), False


class _Seen:
    """A disk from outside of it: through the kernel, for `Oracle`."""

    def pass_time(self) -> None:
        """Nobody sees anything late here."""

    def listing(self, path: str) -> list[str]:
        return sorted(os.listdir(path))

    def contents(self, path: str) -> bytes | None:
        try:
            return Path(path).read_bytes()
        except FileNotFoundError:
            return None


class MountedWorld(World):
    """A world whose disk is mounted."""

    disk: Any

    def __init__(self, seed: int, mount: Path, creator: FileSystem) -> None:
        self.random = Random(seed)
        self.disk = _Seen()
        self.oracle = Oracle(self.disk, str(mount / "cache"))
        create_store(self.oracle.cache_dir, SPEC, fs=creator)

    def client(self, *unused: Any) -> Any:
        return _Calm()

    def damage_index(self, seed: int, how: str) -> None:
        assert how == "drop"
        os.unlink(self.oracle.index_path)

    def write_until_cut(
        self, power: Power, random: Random, fs: FileSystem
    ) -> list[tuple[Iterator[Chosen], list[str]]]:
        """One or two processes commit until power is lost, and die. For each: its choices, and what it told."""
        seeds = [random.getrandbits(32) for _ in range(random.randint(1, 2))]
        power.cut_after(random.randint(0, MOST_REQUESTS * len(seeds)))
        with ExitStack() as stack:
            bodies = [partial(_write_until_cut, self.oracle.cache_dir, seed, fs) for seed in seeds]
            children = [stack.enter_context(child(body)) for body in bodies]
            try:
                power.wait_until_cut()
            finally:
                for process, _ in children:
                    os.kill(process, signal.SIGKILL)
                statuses = {finish(process) for process, _ in children}
            assert statuses <= {0, -signal.SIGKILL}, "a process failed before power was lost"
            told = [read_all(reading).decode().split() for _, reading in children]
        return list(zip(map(choices, seeds), told, strict=True))

    def account_for(self, told: list[tuple[Iterator[Chosen], list[str]]]) -> None:
        """What was told is there, bit by bit; of what was not told only the last may be there."""
        for chosen, names in told:
            for name, numbers in zip(names, chosen, strict=False):
                self._attempt(numbers)
                self.oracle.acknowledge(name, set(numbers))
                data = self.oracle.contents(name)
                wanted = {number: VALUES[number, variant] for number, variant in numbers.items()}
                assert read_shard(data, data) == wanted, f"shard {name} is torn or not what was committed"
            self._attempt(*islice(chosen, 1))

    def _attempt(self, *several: Chosen) -> None:
        for numbers in several:
            for number, variant in numbers.items():
                self.oracle.attempt(number, variant)

"""A trial that goes on and on: as many reads, commits and refreshes as hours of training make, at full speed.

The equivalence: 4 hours at one step a second on 8 GPUs, one sample a step and GPU, are 14,400 reads in each of 8
processes, 115,200 in all. While it fills the cache, each of them commits a shard a minute: 240, or 1,920 in all.
They refresh after each minute here, where training does so once an epoch. One seed is such a job.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

from torch import Tensor

from store_kit import SPEC, equal, make_feature, make_key, write_shard
from trials.children import Child
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache, ShardWriter, prune

RANKS = 8
MINUTES = 240
READS_PER_MINUTE = 60
PRUNE_EVERY_MINUTES = 5
"""Rank 0 prunes and saves the index, so that the number of shards stays what it is."""
NUMBERS = 512
WRITTEN_PER_RANK = 4
MOST_S_PER_MINUTE = 5.0
"""Where it takes longer than this, it hangs."""
MOST_MORE_DESCRIPTORS = 8
MOST_MORE_BYTES = 1024 * 1024
"""Of memory, in the second half of the time, in a process that reads and commits all along.

In the first half the allocator still finds its size: over four times the time each quarter adds less than the one
before, while Python itself holds no more than at the start.
"""


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a process has of the system at one moment."""

    descriptors: int
    anonymous_bytes: int
    """Memory that is resident and no file's. Pages shared with the parent since the fork count: copying adds none."""
    resident_bytes: int

    @classmethod
    def now(cls) -> Use:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        anonymous, resident = (int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "VmRSS"))
        return cls(
            descriptors=len(os.listdir("/proc/self/fd")), anonymous_bytes=anonymous, resident_bytes=resident
        )


def soak(seed: int, folder: Path, *, minutes: int = MINUTES, ranks: int = RANKS) -> int:
    """Every read is compared bit by bit; descriptors and memory of each process stay what they were."""
    for shard in range(0, NUMBERS, 16):
        write_shard(folder, range(shard, shard + 16), max_records=16)
    features = [make_feature(number) for number in range(NUMBERS)]
    with ExitStack() as stack:
        children = [
            stack.enter_context(
                Child(
                    partial(_train, folder, features, rank, Random(seed * ranks + rank), minutes),
                    _log(folder, rank),
                )
            )
            for rank in range(ranks)
        ]
        for child in children:
            child.wait(MOST_S_PER_MINUTE * minutes)
            child.well()
    return ranks * minutes * READS_PER_MINUTE


def _log(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _train(folder: Path, features: list[Tensor], rank: int, random: Random, minutes: int) -> None:
    uses: list[Use] = []
    with FeatureCache.open(folder) as cache:
        assert all(equal(_read(cache, number), features[number]) for number in range(NUMBERS))
        for minute in range(minutes):
            for _ in range(READS_PER_MINUTE):
                number = random.randrange(NUMBERS)
                assert equal(_read(cache, number), features[number]), f"number {number} is wrong"
            _commit(folder, features, rank)
            cache.refresh()
            if rank == 0 and minute % PRUNE_EVERY_MINUTES == 0:
                prune(folder, dry_run=False)
                cache.save_index()
            uses.append(Use.now())
    _check_flat(uses)


def _read(cache: FeatureCache, number: int) -> Tensor | None:
    """A shard of the snapshot may have been pruned: then a refresh finds the one for whose sake it was."""
    for _ in range(10):
        try:
            return cache.get_by_key(make_key(number))
        except CacheAccessError:
            cache.refresh()
    return cache.get_by_key(make_key(number))


def _commit(folder: Path, features: list[Tensor], rank: int) -> None:
    """The same features each time, so that the older shard of them can be pruned."""
    first = rank * WRITTEN_PER_RANK
    with ShardWriter(folder / SPEC.short_name, SPEC, max_records=WRITTEN_PER_RANK) as writer:
        for number in range(first, first + WRITTEN_PER_RANK):
            writer.append(make_key(number), features[number])
        writer.commit()


def _check_flat(uses: list[Use]) -> None:
    warm = max(1, len(uses) // 2)
    first, rest = uses[:warm], uses[warm:]
    for name, most in (
        ("descriptors", MOST_MORE_DESCRIPTORS),
        ("anonymous_bytes", MOST_MORE_BYTES),
        ("resident_bytes", MOST_MORE_BYTES),
    ):
        before = max(getattr(use, name) for use in first)
        later = max((getattr(use, name) for use in rest), default=0)
        print(f"{name}: {before:,} in the first half, then {later:,}")
        assert later <= before + most, f"{name} grew from {before:,} to {later:,}"

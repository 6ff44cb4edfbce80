"""What runs on clients, in forked processes; arguments and results are JSON. The cache lies on the server."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from store_kit import SPEC, equal, make_feature, make_key, save_index, write_shard
from trials import children, listing_races
from trials.nfs.transfers import read, write  # noqa: F401 (jobs too)
from trials.small_runs import Scene, small_checkpoint, stored
from trials.toy_encoder import ToyCheckpoint
from vggt_cache.errors import CorruptRecordError, ShardFormatError
from vggt_cache.store import FeatureCache

MOUNT = Path("/mnt/cache")
CACHE = MOUNT / "cache"
say: Callable[[Any], None] = print
"""Tell the host something while the job goes on; each job has its own."""


def mount(version: str, server: str, export: str) -> None:
    """As people do: hard, attributes cached for as long as it is usual."""
    source = f"{server}:{'/cache' if version.startswith('4') else export}"
    options = f"vers={version},hard,proto=tcp"
    subprocess.run(["mount.nfs", source, str(MOUNT), "-o", options], check=True, stdout=sys.stderr)


def unmount() -> None:
    subprocess.run(["umount", str(MOUNT)], check=True, stdout=sys.stderr)


def forget() -> None:
    """What is cached of files and folders goes, as on a client that has not seen them for long."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


# ---------------------------------------------------------------- commits


def write_for(seconds: float, first: int) -> int:
    """Commit one shard after the other, and tell each number when its commit has returned; how many there were."""
    ends_s, random, number = time.monotonic() + seconds, Random(first), first
    while time.monotonic() < ends_s:
        numbers = range(number, number + random.choice((1, 1, 2, 8)))
        write_shard(CACHE, numbers)
        say([list(numbers), time.time()])
        number = numbers.stop
        time.sleep(random.uniform(0.0, 0.3))
    return number - first


def watch_for(seconds: float) -> dict[str, Any]:
    """A reader that refreshes: shards come and stay, features are right; when each shard was first seen."""
    ends_s, seen, reads = time.monotonic() + seconds, {}, 0
    with FeatureCache.open(CACHE, context="frame") as cache:
        while time.monotonic() < ends_s:
            cache.refresh()
            names = cache.shard_names()
            assert set(seen) <= set(names), f"the snapshot forgot {set(seen) - set(names)}"
            new = [name for name in names if name not in seen]
            seen |= dict.fromkeys(new, time.time())
            reads += _read_all(cache, only=new)
            time.sleep(0.02)
    return {"seen": seen, "reads": reads}


def _read_all(cache: FeatureCache, only: Sequence[str] | None = None) -> int:
    """Every feature is the one that belongs to its key."""
    count = 0
    for number in _numbers(cache):
        if only is None or cache.shard_of(make_key(number)) in only:
            assert equal(cache.get_by_key(make_key(number)), make_feature(number)), f"{number} is wrong"
            count += 1
    return count


_NUMBERS: dict[bytes, int] = {}


def _numbers(cache: FeatureCache) -> list[int]:
    """The numbers whose keys the cache has; they come in rows that begin at whole millions."""
    if not _NUMBERS:
        _NUMBERS.update(
            {make_key(n): n for first in range(0, 4_000_000, 1_000_000) for n in range(first, first + 3000)}
        )
    return [_NUMBERS[key] for key in cache]


def commit(first: int, count: int) -> str:
    """One shard; its name."""
    return write_shard(CACHE, range(first, first + count))


def find(numbers: Sequence[int]) -> list[int]:
    """Those of the numbers that a cache opened now does not have. All that it has is right."""
    with FeatureCache.open(CACHE, context="frame") as cache:
        _read_all(cache)
        return [number for number in numbers if make_key(number) not in cache]


# ---------------------------------------------------------------- listings


def replace_for(seconds: float, seed: int) -> int:
    """Commit, prune and convert without end; how often."""
    ends_s, count, random = time.monotonic() + seconds, 0, Random(seed)
    replacer = listing_races.Replacer(CACHE, random)
    replacer.commit()
    for number in range(listing_races.BYSTANDERS):
        (CACHE / SPEC.short_name / "shards" / f"{number:0200}").touch()
    if seed % 2:
        save_index(CACHE)
    say("begun")
    while time.monotonic() < ends_s:
        replacer.work()
        count += 1
    return count


def list_for(seconds: float) -> int:
    """Open and refresh: every feature is found each time, and is right where its shard is still there."""
    ends_s, count = time.monotonic() + seconds, 0
    while time.monotonic() < ends_s:
        with FeatureCache.open(CACHE, spec=SPEC) as cache:
            for _ in range(10):
                listing_races.check(cache)
                cache.refresh()
        count += 10
    return count


# ---------------------------------------------------------------- damage


def examine(count: int, use_index: bool) -> dict[str, list[int]]:
    """Of the numbers up to `count` those that are told to be damaged, and that are not there; no other is wrong."""
    damaged, absent = [], []
    with warnings.catch_warnings(), FeatureCache.open(CACHE, spec=SPEC, use_index=use_index) as cache:
        for number in range(count):
            try:
                feature = cache.get_by_key(make_key(number))
            except (CorruptRecordError, ShardFormatError):
                damaged.append(number)
                continue
            if feature is None:
                absent.append(number)
            else:
                assert equal(feature, make_feature(number)), f"{number} is wrong"
        hidden = [name for name, _ in cache.damaged_shards]
    return {"damaged": damaged, "absent": absent, "hidden": hidden}


# ---------------------------------------------------------------- runs


def run(cache: str, flags: Sequence[str], small: bool, pause_s: float, ttl_s: float) -> dict[str, Any]:
    """`precompute` on data and cache of the server: how it ended, and what it said."""
    faulthandler.cancel_dump_traceback_later()  # its thread would be missing in the process that this one forks
    children.STUCK_S = 500.0  # a server that was away is found again after a minute or two
    os.environ["VGGT_CACHE_CLAIM_TTL_S"] = str(ttl_s)
    folder = Path("/mnt/tmp/scene")  # the same on all clients: images are known by their paths
    folder.mkdir(exist_ok=True)
    with suppress(FileExistsError):
        (folder / "data").symlink_to(MOUNT / "data")
    checkpoint = small_checkpoint() if small else ToyCheckpoint(pause_s=pause_s)
    scene = Scene(folder=folder, checkpoint=checkpoint, flags=tuple(flags), expected={}, seconds=0.0)
    end = scene.start(MOUNT / cache).end()
    return {"status": end.status, "said": end.said[-2000:]}


def digest(cache: str) -> dict[str, str]:
    """All that is stored, by key, as checksums; nothing may be damaged."""
    return {key.hex(): hashlib.sha256(data).hexdigest() for key, data in stored(MOUNT / cache).items()}

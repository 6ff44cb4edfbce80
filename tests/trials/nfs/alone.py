"""The trials, inside the name spaces that `run_apart` has made."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch

from small_data import write_dataset
from store_kit import SPEC
from trials import small_runs
from trials.nfs.lab import LEASE_S, SAFE, Client, Job, Lab
from trials.nfs.transfers import READING, RECORD_BYTES, WRITING
from trials.small_runs import small_checkpoint
from trials.toy_encoder import ToyCheckpoint
from vggt_cache.store import create_store

MILLION = 1_000_000
RECORDS, PER_SHARD, FLIPS = 30, 6, 25
RESTARTS, RUNS = 4, 6
RECORDS_READ, WANTED, CHUNKS, ROUNDS = 40, 12, 16, 5
TTL_S, OUTAGE_S = 6.0, 60.0


# ---------------------------------------------------------------- commits


def commits(lab: Lab, random: Random) -> int:
    """Both clients commit and read; what was acknowledged is found by both, and never wrong."""
    create_store(lab.export / "cache", SPEC)
    watchers = [client.start("watch_for", seconds=35) for client in lab.clients]
    count = _write(lab, seconds=30)
    for watcher in watchers:
        watcher.result()
    return count


def _write(lab: Lab, seconds: float, meanwhile: Callable[[], object] = lambda: None) -> int:
    """All clients commit; what was acknowledged to one is found by a cache that another one opens afterwards."""
    writers = [
        client.start("write_for", seconds=seconds, first=number * MILLION)
        for number, client in enumerate(lab.clients)
    ]
    meanwhile()
    for writer in writers:
        writer.result()
    acknowledged = [number for writer in writers for numbers, _ in writer.said for number in numbers]
    for client in lab.clients:
        missing = client.call("find", numbers=acknowledged)
        assert not missing, f"{client.name} does not find {missing}"
    return sum(len(writer.said) for writer in writers)


def listings(lab: Lab, random: Random) -> int:
    """One client replaces shards, the other one lists them."""
    create_store(lab.export / "cache", SPEC)
    count = 0
    for number in range(2):
        replacer = lab.clients[number].start("replace_for", seconds=40, seed=random.randrange(1000))
        while not replacer.said:
            time.sleep(0.1)
        count += lab.clients[1 - number].call("list_for", seconds=35)
        replacer.result()
    return count


# ---------------------------------------------------------------- damage


def damage(lab: Lab, random: Random) -> int:
    """A bit of a file flips on the server: clients that have not read it before are told, for what it touches."""
    for first in range(0, RECORDS, PER_SHARD):
        lab.clients[0].call("commit", first=first, count=PER_SHARD)
    shards = sorted((lab.export / "cache" / SPEC.short_name / "shards").iterdir())
    assert len(shards) == RECORDS // PER_SHARD
    for number in range(FLIPS):
        client, which = random.choice(lab.clients), random.randrange(len(shards))
        with _flipped_bit(shards[which], random):
            client.call("examine", count=RECORDS, use_index=True)  # from its memory, or the server's
            client.call("forget")
            found = client.call("examine", count=RECORDS, use_index=number % 2 == 0)
            told = {*found["damaged"], *found["absent"]}
            assert told or found["hidden"] or number % 2 == 0, (
                f"nobody was told of a damage in {shards[which]}"
            )
            assert told <= set(range(which * PER_SHARD, (which + 1) * PER_SHARD)), found
        client.call("forget")
        found = client.call("examine", count=RECORDS, use_index=False)
        assert not any(found.values()), found
    return FLIPS


@contextmanager
def _flipped_bit(path: Path, random: Random) -> Iterator[None]:
    path.chmod(0o644)
    place, bit = random.randrange(path.stat().st_size), 1 << random.randrange(8)

    def flip() -> None:
        with path.open("r+b", buffering=0) as file:
            file.seek(place)
            value = file.read(1)[0]
            file.seek(place)
            file.write(bytes([value ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


# ---------------------------------------------------------------- the server


def restarts(lab: Lab, random: Random) -> int:
    """The server ends without a word and comes back, while both clients commit and read."""
    create_store(lab.export / "cache", SPEC)
    watchers = [client.start("watch_for", seconds=100) for client in lab.clients]

    def restart() -> None:
        for _ in range(RESTARTS):
            time.sleep(random.uniform(0.5, 6.0))
            lab.server.kill()
            time.sleep(random.uniform(0.0, 5.0))
            lab.server.start()
            time.sleep(random.choice((0.0, LEASE_S + 5.0)))  # within its grace period, or behind it

    _write(lab, 90, restart)
    for watcher in watchers:
        watcher.result()
    return RESTARTS


# ---------------------------------------------------------------- whole runs


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Data on the server, and what one undisturbed run on a local disk makes of it, by key as checksums."""

    lab: Lab
    flags: tuple[str, ...]
    small: bool
    """The small encoder, real; or the toy, which takes as long as one likes."""
    pause_s: float
    expected: dict[str, str]

    @classmethod
    def make(cls, lab: Lab, random: Random, *, small: bool, pause_s: float) -> Scene:
        if not (lab.export / "data").exists():
            write_dataset(lab.export / "data", episodes=8, steps=4)
        flags = ("--context", random.choice(("frame", "causal")))
        folder = Path(tempfile.mkdtemp(dir=lab.shared.parent))
        (folder / "data").symlink_to(lab.export / "data")
        checkpoint = small_checkpoint() if small else ToyCheckpoint()
        scene = small_runs.Scene(folder=folder, checkpoint=checkpoint, flags=flags, expected={}, seconds=0.0)
        scene.start(folder / "cache").well()
        found = small_runs.stored(folder / "cache")
        expected = {key.hex(): hashlib.sha256(data).hexdigest() for key, data in found.items()}
        return cls(lab=lab, flags=flags, small=small, pause_s=pause_s, expected=expected)

    def start(self, client: Client, cache: str) -> Job:
        about = {"flags": self.flags, "small": self.small, "pause_s": self.pause_s}
        return client.start("run", cache=cache, ttl_s=TTL_S, **about)

    def check(self, cache: str) -> None:
        """Both clients find all of it, as the undisturbed run made it."""
        for client in self.lab.clients:
            assert client.call("digest", cache=cache) == self.expected, f"{client.name} finds something else"


def _end_well(job: Job) -> None:
    end = job.result()
    assert end["status"] == 0, end["said"]


def runs(lab: Lab, random: Random) -> int:
    """Two clients share the work of one run; one of them may be killed, or its machine switched off."""
    for number in range(RUNS):
        scene = Scene.make(lab, random, small=number % 3 == 0, pause_s=0.05)
        cache = f"cache-{number}"
        jobs = [scene.start(client, cache) for client in lab.clients]
        which, how = random.randrange(2), random.choice(("nothing", "process", "machine"))
        time.sleep(random.uniform(0.5, 8.0))
        if how == "process":
            jobs[which].kill()
        elif how == "machine":
            lab.clients[which].crash()
        for job in jobs if how == "nothing" else [jobs[1 - which]]:
            _end_well(job)
        if how == "machine":
            lab.clients[which].boot()
            lab.clients[which].wait()
        scene.check(cache)
    return RUNS


def outages(lab: Lab, random: Random) -> int:
    """A client is cut off from the server for a minute in the middle of a run that two share.

    The other one does all of it. The first ends as well, or, as its locks are lost with its lease, with a sentence; it
    is well when it is run again.
    """
    scene = Scene.make(lab, random, small=False, pause_s=0.5)
    jobs = [scene.start(client, "cache") for client in lab.clients]
    which = random.randrange(2)
    while len(list(lab.export.glob("cache/**/*.alive"))) < 2:
        time.sleep(0.2)
    time.sleep(random.uniform(2.0, 12.0))
    with lab.clients[which].cut_off():
        time.sleep(OUTAGE_S)
    _end_well(jobs[1 - which])
    end = jobs[which].result()
    assert end["status"] == 0 or ("[ERROR]" in end["said"] and "Traceback" not in end["said"]), end["said"]
    scene.check("cache")
    _end_well(scene.start(lab.clients[which], "cache"))
    scene.check("cache")
    return 1


# ---------------------------------------------------------------- measuring


def transfers(lab: Lab, random: Random) -> list[dict[str, Any]]:
    """Every way of `transfers` in turn, several rounds; the rows that `bench_nfs.py` makes figures of."""
    with (lab.export / "raw").open("wb") as file:
        for _ in range(RECORDS_READ):
            file.write(random.randbytes(RECORD_BYTES))
    client, rows = lab.clients[0], []
    for _ in range(ROUNDS):
        for threads in (1, 4):
            for way in random.sample(READING, len(READING)):
                few = way == "mapped"
                wanted = {
                    "records": RECORDS_READ,
                    "wanted": 2 if few else WANTED,
                    "seed": random.randrange(1000),
                }
                rows.append(
                    {
                        "way": way,
                        "threads": threads,
                        **client.call("read", way=way, threads=threads, **wanted),
                    }
                )
                rows[-1]["megabytes_per_s"] = wanted["wanted"] * RECORD_BYTES / 1e6 / rows[-1].pop("seconds")
        alone = client.call("write", way="late", chunks=CHUNKS, pause_s=0.0)["seconds"] / CHUNKS
        for way in random.sample(WRITING, len(WRITING)):
            for pauses in (0, 1):
                row = client.call("write", way=way, chunks=CHUNKS, pause_s=pauses * alone)
                rows.append({"way": way, "pauses": pauses, **row})
    return rows


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    name, seed, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # so that forked processes can compute
    lab = Lab(folder, "3" if seed % 2 else "4.1", card=sys.argv[4] if sys.argv[4:] else SAFE)
    print(json.dumps(globals()[name](lab, Random(seed))))


if __name__ == "__main__":
    main()

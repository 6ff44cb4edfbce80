"""How many precompute processes can share a directory: the real code that claims and chooses, on a clock of its own.

Theory. With claims, no process knows of another but through files, so each pays for looking, for meeting others on its
way, for blocks that are done twice because a look is old, and for waiting at the end. None of that depends on what is
computed, only on how long it takes. So what decides runs as it is: `precompute.todo.Todo`, `precompute.claims.Claims`,
and the cutting of blocks (`precompute.plan.block_bounds`). What it stands on is simulated: the encoder by seconds for a
list, the folder of claims by a table with a latency for each call, the store by when each feature was committed, and
what a look costs by `STORAGES`: parts of it as they took on rows of that number here, and on a mount.

A process is a series of events: fill what is held, encode a block, commit what fills a shard, wait. Events happen in
the order in which they begin, and each moves its process's clock. A call sees what was made in events before its own;
on NFS a listing is up to `stale_s` old, unless the process has changed the folder since.

Efficiency is the encoding time that is needed, each list once, by processes times the time until the last has ended.
With `--engine ray` one driver hands out all blocks instead, see `sim_driver.py`.
The start (imports, scanning, loading) is left out, and so is what processes on one machine take from each other.
`bench_scaling.py` measures real processes against the bare encoder, which leaves the same out: its `ratio_over_bare` is
the efficiency of two by that of one here, with its number of lists and its seconds for each.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import record
from sim_driver import drive
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.plan import Block, Indexes, block_bounds
from vggt_cache.precompute.todo import Todo
from vggt_cache.small_files import FileState, SmallFolder


@dataclass(frozen=True, kw_only=True)
class Storage:
    """Seconds that calls take, and what a look at the store costs."""

    call_s: float
    """Of one call on a small file: to open the folder, to open or create the file, to read or write, to close."""
    entry_s: float
    """Of each name in a listing."""
    commit_s: float
    """From handing over a shard until it is durable."""
    stale_s: float
    """So old may be what a folder shows that the process itself has not changed since."""
    look_s: float
    """Of taking in what is new in the store, each time, whatever its size."""
    files: int
    """of so many files of each process, each a call"""
    million_s: float
    """and for each million of features that it has,"""
    shard_s: float
    """and for each shard that is new."""


STORAGES = {
    "local": Storage(
        call_s=5e-5,
        entry_s=1e-6,
        commit_s=0.2,
        stale_s=0.0,
        look_s=0.01,
        files=2,
        million_s=0.25,
        shard_s=3e-4,
    ),
    "nfs": Storage(
        call_s=3e-3,
        entry_s=2e-5,
        commit_s=0.6,
        stale_s=30.0,
        look_s=0.05,
        files=2,
        million_s=0.5,
        shard_s=3e-3,
    ),
}


class Clock:
    """Of one process; seconds since the run began."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.stands = False
        """While another thread of the process is at work: what that does takes no time from the encoder's."""

    def __call__(self) -> float:
        return self.now_s

    def spend(self, seconds: float) -> None:
        self.now_s += 0.0 if self.stands else seconds

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        self.stands = True
        yield
        self.stands = False


@dataclass
class Server:
    """What lies on the file server, the same for all."""

    files: dict[str, bytes] = field(default_factory=dict)
    calls: int = 0


class Folder(SmallFolder):
    """The folder of claims as one process sees it."""

    def __init__(self, server: Server, clock: Clock, storage: Storage) -> None:
        super().__init__("claims")
        self._server, self._clock, self._storage = server, clock, storage
        self._listed_s, self._listed = -float("inf"), list[str]()

    def _call(self) -> None:
        self._server.calls += 1
        self._clock.spend(self._storage.call_s)

    def make(self) -> None:
        self._call()

    def names(self) -> list[str]:
        self._call()
        now_s = self._clock()
        if now_s - self._listed_s >= self._storage.stale_s:
            self._listed = list(self._server.files)
            self._listed_s = now_s
            self._clock.spend(self._storage.entry_s * len(self._listed))
        return self._listed

    def touch(self, name: str) -> None:
        self._call()
        self._listed_s = -float("inf")

    def read(self, name: str, limit: int, offset: int = 0) -> bytes:
        self._call()
        return self._server.files.get(name, b"")

    def state(self, name: str) -> FileState | None:
        """A mark moves as long as its process runs."""
        self._call()
        return (0, int(self._clock() / 10), 0, 0) if name in self._server.files else None

    def create(self, name: str, data: bytes) -> bool:
        self._call()
        self._listed_s = -float("inf")
        if name in self._server.files:
            return False
        self._server.files[name] = data
        return True

    def remove(self, name: str) -> None:
        self._call()
        self._listed_s = -float("inf")
        self._server.files.pop(name, None)


class QuietClaims(Claims):
    """The mark of a process that runs moves by itself here."""

    def _beat_on(self) -> None:
        pass


class Store:
    """When each feature was committed, and how many shards there are."""

    def __init__(self, features: int) -> None:
        self.committed_s = np.full(features, np.inf)
        self.shards_s: list[float] = []
        self.processes = 0
        self.needed_s = 0.0
        """Encoding time of the features, each once."""


class View:
    """The store as one process knows it: what `Todo` asks of the features."""

    def __init__(self, store: Store, clock: Clock, storage: Storage) -> None:
        self._store, self._clock, self._storage = store, clock, storage
        store.processes += 1
        self._seen_s = -1.0
        self._shards = 0
        self.looks = 0
        self.looking_s = 0.0

    def refresh(self) -> None:
        storage, before_s = self._storage, self._clock()
        self._seen_s = before_s
        shards = len(self._store.shards_s)
        features = np.count_nonzero(self._store.committed_s <= self._seen_s)
        self._clock.spend(storage.look_s + storage.million_s * features / 1e6)
        self._clock.spend(storage.shard_s * min(64, shards - self._shards))
        self._clock.spend(storage.call_s * storage.files * self._store.processes)
        self._shards = shards
        self.looks += 1
        self.looking_s += self._clock() - before_s

    def finished(self, features: Indexes) -> npt.NDArray[np.bool_]:
        done: npt.NDArray[np.bool_] = self._store.committed_s[features] <= self._seen_s
        return done

    def missing(self, features: Iterable[int]) -> list[int]:
        asked = np.fromiter(features, np.int64)
        return asked[~self.finished(asked)].tolist()


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be computed."""

    lists: int
    tree: int
    """Lists that share a prefix, and so stay together."""
    per_block: int
    encode_s: float
    spread: float
    """Of the time that a list takes, from block to block: standard deviation by mean."""
    shard_lists: int

    def blocks(self) -> list[Block]:
        trees = np.append(np.arange(self.tree, self.lists, self.tree), self.lists)
        bounds = block_bounds(trees, self.per_block)
        features = np.arange(self.lists)
        return [
            Block(block_id=f"{number:032x}", features=features[begin:end])
            for number, (begin, end) in enumerate(pairwise(bounds))
        ]


class Process:
    """One process, as `precompute.claimed.ClaimedRun` goes through its blocks; each `step` is one event."""

    def __init__(
        self,
        place: float | None,
        work: Work,
        blocks: list[Block],
        store: Store,
        server: Server,
        storage: Storage,
    ) -> None:
        self.clock = Clock()
        self._work, self._store, self._storage = work, store, storage
        self.view = View(store, self.clock, storage)
        self._claims = QuietClaims(
            Path("claims"), open_folder=lambda path: Folder(server, self.clock, storage), clock_s=self.clock
        )
        self._chance = random.Random(len(server.files))
        self._todo = Todo(blocks, self._claims, self.view, place=place, clock_s=self.clock)
        self._opened: deque[Block] = deque()
        self._open_lists, self._open_s = 0, 0.0
        """In the shard that is open, and since when."""
        self._uncommitted: list[Block] = []
        self.encoding_s = self.waiting_s = self.twice_s = 0.0

    def step(self) -> bool:
        """Whether there is another one."""
        while len(self._opened) < self._todo.ahead and (block := self._todo.take()) is not None:
            self._opened.append(block)
        if self._opened:
            self._encode(self._opened.popleft())
        elif len(self._todo):
            before_s = self.clock()
            self._flush()
            if self._todo.wait():
                self.clock.spend(self._todo.pause_s)
            self.waiting_s += self.clock() - before_s
        else:
            self._flush()
            self._claims.close()
            return False
        return True

    def _encode(self, block: Block) -> None:
        sigma = self._work.spread
        seconds = (
            len(block.features) * self._work.encode_s * self._chance.lognormvariate(-(sigma**2) / 2, sigma)
        )
        self.clock.spend(seconds)
        self.encoding_s += seconds
        again = np.isfinite(self._store.committed_s[block.features]).all()
        self.twice_s += seconds if again else 0.0
        self._store.needed_s += 0.0 if again else seconds
        if not self._open_lists:
            self._open_s = self.clock()
        self._uncommitted.append(block)
        self._open_lists += len(block.features)
        if self._open_lists >= self._work.shard_lists or self.clock() - self._open_s >= 60.0:
            self._commit()

    def _commit(self) -> None:
        """In another thread. What is left of the last block in the next shard is committed with it here."""
        at_s = self.clock() + self._storage.commit_s
        shards = -(-self._open_lists // self._work.shard_lists)
        self._store.shards_s += [at_s] * shards
        with self.clock.elsewhere():
            for block in self._uncommitted:
                earlier = self._store.committed_s[block.features]
                self._store.committed_s[block.features] = np.minimum(earlier, at_s)
                self._todo.done(block.block_id, shows=True)
        self._uncommitted, self._open_lists = [], 0

    def _flush(self) -> None:
        if self._uncommitted:
            self._commit()
            self.clock.spend(self._storage.commit_s)


_MOST_EACH = 5e4
"""Lists of one process: more take hours or days, show nothing more, and are left out."""


def simulate(work: Work, processes: int, storage: Storage, *, ranks: bool) -> dict[str, float]:
    blocks, store, server = work.blocks(), Store(work.lists), Server()
    places = [number / processes if ranks else None for number in range(processes)]
    running = [Process(place, work, blocks, store, server, storage) for place in places]
    events = [(process.clock(), number) for number, process in enumerate(running)]
    heapq.heapify(events)
    while events:
        _, number = heapq.heappop(events)
        if running[number].step():
            heapq.heappush(events, (running[number].clock(), number))
    if not np.isfinite(store.committed_s).all() or server.files:
        raise SystemExit("something was not computed, or a claim was not given back: no result")
    wall_s = max(process.clock() for process in running)
    spent_s = processes * wall_s
    return {
        "processes": processes,
        "lists": work.lists,
        "blocks": len(blocks),
        "wall_s": wall_s,
        "efficiency": store.needed_s / spent_s,
        "looking": sum(process.view.looking_s for process in running) / spent_s,
        "waiting": sum(process.waiting_s for process in running) / spent_s,
        "twice": sum(process.twice_s for process in running) / spent_s,
        "looks_each": sum(process.view.looks for process in running) / processes,
        "calls_per_s": server.calls / wall_s,
    }


def simulate_driven(work: Work, processes: int, storage: Storage) -> dict[str, float]:
    store, clock = Store(work.lists), Clock()
    driven = drive(work, processes, storage, store, clock)
    return {
        "processes": processes,
        "lists": work.lists,
        "blocks": driven["blocks"],
        "wall_s": driven["wall_s"],
        "efficiency": driven["encoding_s"] / (processes * driven["wall_s"]),
    }


COLUMNS = {
    "processes": "{:.0f}",
    "lists": "{:.0e}",
    "blocks": "{:.0f}",
    "wall_s": "{:.0f}",
    "efficiency": "{:.3f}",
    "looking": "{:.4f}",
    "waiting": "{:.4f}",
    "twice": "{:.4f}",
    "looks_each": "{:.0f}",
    "calls_per_s": "{:.0f}",
}


def tell(engine: str, storage: str, tree: int, row: dict[str, float]) -> None:
    cells = (form.format(row[name]).rjust(len(name)) for name, form in COLUMNS.items() if name in row)
    print(f"{engine:>6}  {storage:>7}  {tree:>4}  " + "  ".join(cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 8, 64, 512])
    parser.add_argument("--lists", type=float, nargs="*", default=[1e4, 1e5, 1e6])
    parser.add_argument("--engine", choices=("claims", "ray"), nargs="*", default=["claims", "ray"])
    parser.add_argument("--storage", choices=STORAGES, nargs="*", default=list(STORAGES))
    parser.add_argument("--tree", type=int, nargs="*", default=[1], help="lists that share a prefix")
    parser.add_argument("--encode_s", type=float, default=0.1, help="of one list")
    parser.add_argument("--spread", type=float, default=0.1, help="of these seconds, from block to block")
    parser.add_argument("--shard_lists", type=int, default=42, help="of 6 MB in 256 MB")
    parser.add_argument("--no_ranks", action="store_true", help="processes begin by chance, not by rank")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    print("engine  storage  tree  " + "  ".join(COLUMNS))
    rows: list[dict[str, Any]] = []
    begun_s = time.perf_counter()
    for engine, tree, storage, lists, processes in product(
        arguments.engine,
        arguments.tree,
        arguments.storage,
        map(int, arguments.lists),
        arguments.processes,
    ):
        if lists / processes > _MOST_EACH:
            continue
        work = Work(
            lists=lists,
            tree=tree,
            per_block=64 if tree == 1 else 32,
            encode_s=arguments.encode_s,
            spread=arguments.spread,
            shard_lists=arguments.shard_lists,
        )
        if engine == "ray":
            row = simulate_driven(work, processes, STORAGES[storage])
        else:
            row = simulate(work, processes, STORAGES[storage], ranks=not arguments.no_ranks)
        tell(engine, storage, tree, row)
        rows.append({"engine": engine, "storage": storage, "tree": tree, **row})
    figures = {"rows": rows, "simulated_in_s": time.perf_counter() - begun_s}
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("scale", "cpu", vars(arguments), figures)


if __name__ == "__main__":
    main()

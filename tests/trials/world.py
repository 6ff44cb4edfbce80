"""A store on a simulated disk, all that may happen to it, and the checks after it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from random import Random
from unittest import mock

from simulated_client import Client, Faults, Killed
from simulated_disk import Disk, Node
from store_kit import SPEC, make_key
from trials.baton import Baton
from trials.oracle import FEATURES, NUMBERS, VARIANTS, Oracle, is_known
from vggt_cache.errors import CommitError, CorruptRecordError, StoreError
from vggt_cache.store import FeatureCache, ShardWriter, create_store, prune

CALM = Faults()


@contextmanager
def seeded_names(random: Random) -> Iterator[None]:
    """Names of files from a seed, so that one seed is one run. Damage is expected, so its warnings are not shown."""
    with (
        mock.patch("secrets.token_hex", lambda count: random.randbytes(count).hex()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


class World:
    """One disk, one store, any number of clients."""

    def __init__(self, seed: int = 0) -> None:
        self.random = Random(seed)
        self.disk = Disk()
        self.oracle = Oracle(self.disk, "/cache")
        self._old_indexes: list[bytes] = []
        create_store("/cache", SPEC, fs=self.client())
        self.disk.pass_time()

    def client(self, faults: Faults = CALM, switch: Callable[[], None] = lambda: None) -> Client:
        return Client(self.disk, self.random.getrandbits(64), faults, switch)

    @property
    def damaged(self) -> bool:
        return bool(self.oracle.damaged)

    # ------------------------------------------------------------ clients

    def write(self, client: Client, random: Random, shards: int = 2) -> None:
        """Commit some shards; read one's own features back now and then."""
        for _ in range(shards):
            with suppress(CommitError):
                name, numbers = self.commit(client, random)
                if random.random() < 0.3:
                    self._read_back(client, name, numbers)
        self.check_descriptors(client)

    def commit(self, client: Client, random: Random) -> tuple[str, set[int]]:
        chosen = {
            number: random.randrange(VARIANTS) for number in random.sample(NUMBERS, random.randint(1, 4))
        }
        store_dir = f"{self.oracle.cache_dir}/{SPEC.short_name}"
        with ShardWriter(store_dir, SPEC, max_records=4, fs=client) as writer:
            for number, variant in chosen.items():
                self.oracle.attempt(number, variant)
                writer.append(make_key(number), FEATURES[number, variant])
            name = writer.commit()
        self.oracle.acknowledge(name, set(chosen))
        return name, set(chosen)

    def _read_back(self, client: Client, name: str, numbers: set[int]) -> None:
        with suppress(StoreError), FeatureCache.open(self.oracle.cache_dir, spec=SPEC, fs=client) as cache:
            for number in numbers:
                self.get(cache, client, number, expected=not self.damaged)
            cache.save_index()

    def read(self, client: Client, random: Random, rounds: int = 4) -> None:
        """Open, read and refresh: nothing foreign is ever given, and what was seen stays."""
        with suppress(StoreError), FeatureCache.open(self.oracle.cache_dir, spec=SPEC, fs=client) as cache:
            for _ in range(rounds):
                held = {number for number in NUMBERS if make_key(number) in cache}
                # What only the index still tells of a shard with a damaged header may go with the index.
                sure = held & self.oracle.intact(cache.shard_names()) if self.damaged else held
                for number in random.sample(NUMBERS, 5):
                    self.get(cache, client, number, expected=number in sure and not self.oracle.pruned)
                self._refresh(cache, held, must_keep=not (self.damaged or client.faults.late))
        self.check_descriptors(client)

    def _refresh(self, cache: FeatureCache, held: set[int], *, must_keep: bool) -> None:
        before = set(cache.shard_names())
        with suppress(StoreError):
            cache.refresh()
        forgotten = before - set(cache.shard_names())
        assert not forgotten & set(self.oracle.names()), f"the snapshot forgot {forgotten}"
        lost = {number for number in held if make_key(number) not in cache}
        assert not lost or not must_keep, f"after a refresh the numbers {lost} are gone"

    def get(self, cache: FeatureCache, client: Client, number: int, *, expected: bool) -> None:
        try:
            feature = cache.get_by_key(make_key(number))
        except CorruptRecordError:
            assert self.damaged, f"number {number} is reported as damaged, and nothing is"
        except StoreError:
            assert client.faults.rate or self.oracle.pruned or self.damaged
        else:
            assert feature is not None or not expected, f"number {number} is not found"
            assert feature is None or is_known(number, feature), f"number {number} is foreign"

    def prune(self, client: Client, random: Random, *, damaged: bool | None = None) -> None:
        self.oracle.pruned = True
        with suppress(StoreError):
            wanted = random.random() < 0.5 if damaged is None else damaged
            prune(self.oracle.cache_dir, dry_run=False, damaged=wanted, fs=client)
        self.check_descriptors(client)

    def check_descriptors(self, client: Client) -> None:
        if client.open_files and not client.dead:
            gc.collect()
            assert not client.open_files, f"descriptors leak: {client.open_files}"

    # ------------------------------------------------------------ all at once

    def burst(self, seed: int, clients: str, faults: Faults = CALM, power_at: int | None = None) -> None:
        """Clients (w: writer, r: reader, p: pruner) interleaved by the seed; power may be cut at an operation."""
        random = Random(seed)
        baton = Baton(random)
        roles = {"w": self.write, "r": self.read, "p": self.prune}
        self.oracle.pruned = self.oracle.pruned or "p" in clients
        bodies = []
        for position, role in enumerate(clients):
            own = faults if position == 0 else replace(faults, kill_at=None)
            client = Client(self.disk, random.getrandbits(64), own, baton.switch)
            bodies.append(partial(_until_killed, roles[role], client, Random(random.getrandbits(64))))
        self._cut_power_after(power_at)
        with seeded_names(random):
            baton.run(bodies)
        self.disk.at_tick = lambda tick: None

    def _cut_power_after(self, operations: int | None) -> None:
        if operations is None:
            return
        last = self.disk.tick + operations

        def at_tick(tick: int) -> None:
            self.disk.powered = self.disk.powered and tick <= last

        self.disk.at_tick = at_tick

    # ------------------------------------------------------------ mishaps

    def lose_power(self, seed: int, model: str) -> None:
        self.disk.lose_power(Random(seed), model)

    def damage_shard(self, seed: int, how: str) -> None:
        """Flip a bit, zero a stretch or cut a shard."""
        self.oracle.check_files()  # what was pruned must have been elsewhere before this
        random, names = Random(seed), self.oracle.names()
        if names:
            name = random.choice(names)
            self.oracle.damage(name, spoilt(self.oracle.contents(name), random, how))

    def damage_index(self, seed: int, how: str) -> None:
        """Flip, zero, cut, drop, or put back an old one."""
        random, data = Random(seed), self.disk.contents(self.oracle.index_path)
        if data is None:
            return
        self._old_indexes.append(data)
        if how == "drop":
            self._index_folder().names.pop("rows")
            self._index_folder().durable_names.pop("rows", None)
            self._index_folder().pending.clear()
        elif how == "old":
            self.disk.alter(self.oracle.index_path, random.choice(self._old_indexes))
        else:
            self.disk.alter(self.oracle.index_path, spoilt(data, random, how))

    def _index_folder(self) -> Node:
        folder = self.disk.find(self.oracle.index_path.rpartition("/")[0])
        assert folder is not None
        return folder

    def move(self) -> None:
        """The whole cache directory under another name."""
        new = f"/cache{self.disk.tick}"
        for names in (self.disk.root.names, self.disk.root.durable_names):
            names[new[1:]] = names.pop(self.oracle.cache_dir[1:])
        self.oracle.cache_dir = new


def _until_killed(body: Callable[[Client, Random], None], client: Client, random: Random) -> None:
    with suppress(Killed):
        body(client, random)


def spoilt(data: bytes, random: Random, how: str) -> bytes:
    """The same bytes with one bit flipped, a stretch zeroed, or the end cut off; of no bytes nothing can be spoilt."""
    if how == "cut" or not data:
        return data[: random.randrange(len(data) + 1)]
    position = random.choice(
        (random.randrange(len(data)), random.randrange(max(0, len(data) - 100), len(data)))
    )
    if how == "flip":
        return data[:position] + bytes([data[position] ^ 1 << random.randrange(8)]) + data[position + 1 :]
    zeros = data[position : position + random.randint(1, 600)]
    return data[:position] + bytes(len(zeros)) + data[position + len(zeros) :]

"""Faults that the trials found, each as the shortest run that shows it.

Each of these tests failed when it was written: `prune` removed a shard for the sake of one whose name was not on the
disk yet, or whose commit failed afterwards and was taken back; opening could miss what was superseded and pruned
after the listing; an error in listing a folder for temporary files had no name; and specifications with different
fingerprints could be equal.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from simulated_client import Client, Faults, Killed
from simulated_disk import Disk, failure
from store_kit import SPEC, Call, TracedFileSystem, equal, make_feature, make_key, write_shard
from vggt_cache.errors import CacheAccessError, CommitError, SpecMismatchError
from vggt_cache.store import FeatureCache, ShardWriter, convert, create_store, describe, prune
from vggt_cache.store.header import parse_spec
from vggt_cache.store.index import IndexFile

STORE = f"/cache/{SPEC.short_name}"


def commit(client: Client, *numbers: int) -> str:
    with ShardWriter(STORE, SPEC, max_records=4, fs=client) as writer:
        for number in numbers:
            writer.append(make_key(number), make_feature(number))
        return writer.commit()


def new_disk() -> Disk:
    disk = Disk()
    create_store("/cache", SPEC, fs=Client(disk))
    return disk


def numbers_on(disk: Disk) -> set[int]:
    with FeatureCache.open("/cache", spec=SPEC, fs=Client(disk)) as cache:
        return {number for number in range(4) if make_key(number) in cache}


class Interposed(Client):
    """Has something else happen at one operation, before or after it."""

    def __init__(
        self, disk: Disk, operation: str, *, before: Callable[[], Any], after: Callable[[], Any]
    ) -> None:
        super().__init__(disk)
        self._at, self._before, self._after = operation, before, after

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name.startswith("_") or name != self._at:
            return method

        def interposed(*args: Any, **options: Any) -> Any:
            self._at = ""
            self._before()
            result = method(*args, **options)
            self._after()
            return result

        return interposed


def nothing() -> None:
    """Happens most of the time."""


def operations_of_a_commit() -> list[str]:
    client = Client(new_disk())
    commit(client, 1, 2, 3)
    return client.trace


def unsynced_successor() -> Disk:
    """A committed shard, and one that holds all of its records, whose writer died before it synced the directory."""
    disk = new_disk()
    commit(Client(disk), 1, 2)
    dies_at = operations_of_a_commit().index("fsync_directory") + 1
    with pytest.raises(Killed):
        commit(Client(disk, faults=Faults(kill_at=dies_at)), 1, 2, 3)
    return disk


def test_a_shard_is_not_pruned_for_one_whose_name_is_not_on_the_disk_yet() -> None:
    """The power fails right after the removal."""
    lost = []
    for seed in range(40):
        disk = unsynced_successor()
        client = Interposed(disk, "unlink", before=nothing, after=nothing)
        client._after = client.die
        with pytest.raises(Killed):
            prune("/cache", dry_run=False, fs=client)
        disk.lose_power(Random(seed), "names")
        if not {1, 2} <= numbers_on(disk):
            lost.append(seed)
    assert lost == []


def test_a_shard_is_not_converted_away_for_one_whose_name_is_not_on_the_disk_yet() -> None:
    """All its records are superseded, so that convert has nothing of it to rewrite."""
    lost = []
    for seed in range(40):
        disk = unsynced_successor()
        client = Interposed(disk, "unlink", before=nothing, after=nothing)
        client._after = client.die
        with pytest.raises(Killed):
            list(convert("/cache", SPEC, "lossless", dry_run=False, fs=client))
        disk.lose_power(Random(seed), "names")
        if not {1, 2} <= numbers_on(disk):
            lost.append(seed)
    assert lost == []


def test_a_shard_is_not_pruned_for_one_whose_commit_fails_afterwards() -> None:
    disk = new_disk()
    commit(Client(disk), 1, 2)

    def fail() -> None:
        prune("/cache", dry_run=False, fs=Client(disk))
        raise failure(errno.EIO)

    with pytest.raises(CommitError):
        commit(Interposed(disk, "fsync_directory", before=fail, after=nothing), 1, 2, 3)
    assert {1, 2} <= numbers_on(disk)


def test_opening_while_a_shard_is_superseded_and_pruned_misses_nothing() -> None:
    disk = new_disk()
    commit(Client(disk), 1, 2)

    def supersede() -> None:
        commit(Client(disk), 1, 2, 3)
        prune("/cache", dry_run=False, fs=Client(disk))

    folder = f"{STORE}/shards"

    class Racing(Client):
        raced = False

        def list_names(self, dir_fd: int) -> list[str]:
            names = super().list_names(dir_fd)
            if self._node(dir_fd) is disk.find(folder) and not self.raced:
                self.raced = True
                supersede()
            return names

    with FeatureCache.open("/cache", spec=SPEC, fs=Racing(disk)) as cache:
        assert make_key(1) in cache
        assert make_key(2) in cache


class ListsSlowly(Client):
    """Its first listing of the shards passes the place of new names before, and that of old ones after, `between`."""

    def __init__(self, disk: Disk, between: Callable[[], Any]) -> None:
        super().__init__(disk)
        self._between: Callable[[], Any] | None = between

    def list_names(self, dir_fd: int) -> list[str]:
        before = set(super().list_names(dir_fd))
        if self._node(dir_fd) is not self.disk.find(f"{STORE}/shards"):
            return sorted(before)
        if self._between is not None:
            between, self._between = self._between, None
            between()
        return sorted(before & set(super().list_names(dir_fd)))


def replaced_by_prune(disk: Disk) -> None:
    commit(Client(disk), 1, 2, 3)
    prune("/cache", dry_run=False, fs=Client(disk))


def replaced_by_a_pruner_that_is_killed_then(disk: Disk) -> None:
    commit(Client(disk), 1, 2, 3)
    client = Interposed(disk, "unlink", before=nothing, after=nothing)
    client._after = client.die
    with pytest.raises(Killed):
        prune("/cache", dry_run=False, fs=client)


def replaced_by_convert(disk: Disk) -> None:
    list(convert("/cache", SPEC, "lossless", dry_run=False, fs=Client(disk)))


def replaced_by_repair(disk: Disk) -> None:
    (path,) = disk.listing(f"{STORE}/shards")
    data = disk.contents(f"{STORE}/shards/{path}")
    assert data is not None
    disk.alter(f"{STORE}/shards/{path}", data[:-1] + bytes([data[-1] ^ 1]))  # of number 2
    prune("/cache", dry_run=False, damaged=True, fs=Client(disk))


@pytest.mark.parametrize("index", ["index", "no index"])
@pytest.mark.parametrize(
    "replace",
    [replaced_by_prune, replaced_by_a_pruner_that_is_killed_then, replaced_by_convert, replaced_by_repair],
)
def test_a_listing_that_shows_neither_a_shard_nor_its_successor_hides_nothing(
    replace: Callable[[Disk], None], index: str
) -> None:
    for opened_before in (False, True):
        disk = new_disk()
        commit(Client(disk), 1, 2)
        if index == "index":
            with FeatureCache.open("/cache", fs=Client(disk)) as cache:
                assert cache.save_index()
        reader = ListsSlowly(disk, nothing if opened_before else lambda disk=disk: replace(disk))
        with FeatureCache.open("/cache", fs=reader) as cache:
            if opened_before:
                reader._between = lambda disk=disk: replace(disk)
                cache.refresh()
            assert equal(cache.get_by_key(make_key(1)), make_feature(1))


def test_an_index_that_another_process_saves_names_what_the_last_one_named() -> None:
    """A writer whose snapshot is older than the prune must not take the successor's name away."""
    disk = new_disk()
    commit(Client(disk), 1, 2)
    with FeatureCache.open("/cache", fs=Client(disk)) as old:
        successor = commit(Client(disk), 1, 2, 3)
        with FeatureCache.open("/cache", fs=Client(disk)) as other:
            assert other.save_index()
        commit(Client(disk), 4)
        with old.with_shards([*old.shard_names(), max(disk.listing(f"{STORE}/shards"))]) as older:
            assert older.save_index()
    assert successor in IndexFile(STORE, SPEC.fingerprint, Client(disk)).shard_names()


def test_the_index_that_is_saved_before_a_removal_does_not_rest_on_a_listing() -> None:
    """The pruner knows the successor, and its next listing lacks it."""
    disk = new_disk()
    commit(Client(disk), 1, 2)
    successor = commit(Client(disk), 1, 2, 3)

    class Forgets(Client):
        shown = 0

        def list_names(self, dir_fd: int) -> list[str]:
            names = super().list_names(dir_fd)
            self.shown += successor in names
            # Once where temporary files are looked for, once where the store's headers are read.
            return [name for name in names if name != successor or self.shown <= 2]

    prune("/cache", dry_run=False, fs=Forgets(disk))
    assert disk.listing(f"{STORE}/shards") == [successor]
    assert IndexFile(STORE, SPEC.fingerprint, Client(disk)).shard_names() == [successor]


def test_nothing_is_pruned_where_no_index_can_be_saved() -> None:
    disk = new_disk()
    old = commit(Client(disk), 1, 2)
    commit(Client(disk), 1, 2, 3)

    class Full(Client):
        def create_file(self, name: str, *, dir_fd: int) -> int:
            raise failure(errno.ENOSPC)

    with pytest.raises(CommitError, match="the disk is full"):
        prune("/cache", dry_run=False, fs=Full(disk))
    assert old in disk.listing(f"{STORE}/shards")


def test_an_index_finds_room_where_the_last_one_was() -> None:
    """A disk that is full to the last byte can be pruned."""
    disk = new_disk()
    old = commit(Client(disk), 1, 2)
    with FeatureCache.open("/cache", fs=Client(disk)) as cache:
        assert cache.save_index()
    commit(Client(disk), 1, 2, 3)

    class Full(Client):
        full = True

        def create_file(self, name: str, *, dir_fd: int) -> int:
            if self.full:
                raise failure(errno.ENOSPC)
            return super().create_file(name, dir_fd=dir_fd)

        def unlink(self, name: str, *, dir_fd: int) -> None:
            super().unlink(name, dir_fd=dir_fd)
            self.full = False

    prune("/cache", dry_run=False, fs=Full(disk))
    assert old not in disk.listing(f"{STORE}/shards")


@pytest.mark.parametrize("look", [describe, prune])
def test_a_folder_that_cannot_be_listed_is_an_error_with_a_name(
    tmp_path: Any, look: Callable[..., Any]
) -> None:
    write_shard(tmp_path, [1])
    counted = TracedFileSystem()
    look(tmp_path, fs=counted)
    for nth in range(counted.operations.count("list_names")):
        seen = -1

        def fault(name: str, position: int, call: Call, nth: int = nth) -> Any:
            nonlocal seen
            seen += name == "list_names"
            if name == "list_names" and seen == nth:
                raise failure(errno.ESTALE)
            return call()

        try:
            look(tmp_path, fs=TracedFileSystem(fault))
        except CacheAccessError:
            continue


@pytest.mark.parametrize("version", ["true", "1.0"])
def test_a_specification_that_is_equal_has_the_same_fingerprint(version: str) -> None:
    text = SPEC.to_json().replace('"computation_version":1', f'"computation_version":{version}')
    assert text != SPEC.to_json()
    with pytest.raises(SpecMismatchError):
        parse_spec(text)

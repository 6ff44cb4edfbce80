"""The simulated disk itself: it forgets what a disk may forget, and nothing else."""

from __future__ import annotations

import errno
from random import Random

import pytest

from simulated_client import Client, Faults, Killed
from simulated_disk import BLOCK_BYTES, MODELS, Disk
from trials.baton import Baton
from trials.table import DOCUMENT, with_tables
from vggt_cache.store import FileSystem

SEEDS = range(60)
CONTENT = bytes(range(1, 256)) * 4


def written(disk: Disk, *, synced: bool, named: bool) -> Client:
    """A client that made the file /new."""
    client = Client(disk)
    root = client.open_directory("/")
    fd = client.create_file("new", dir_fd=root)
    client.pwrite(fd, CONTENT, 0)
    if synced:
        client.fsync(fd)
    if named:
        client.fsync_directory(root)
    return client


def survivors(model: str, *, synced: bool, named: bool) -> set[bytes | None]:
    """What becomes of the file in many power losses."""
    found = set()
    for seed in SEEDS:
        disk = Disk()
        written(disk, synced=synced, named=named)
        disk.lose_power(Random(seed), model)
        found.add(disk.contents("/new"))
    return found


@pytest.mark.parametrize("model", MODELS)
def test_what_was_synced_survives_every_power_loss(model: str) -> None:
    assert survivors(model, synced=True, named=True) == {CONTENT}


def test_a_name_that_was_not_synced_may_be_lost_and_may_survive() -> None:
    assert survivors("names", synced=True, named=False) == {CONTENT, None}
    assert survivors("data", synced=True, named=False) == {CONTENT}


def test_contents_that_were_not_synced_may_be_lost_cut_zeroed_and_may_survive() -> None:
    assert survivors("names", synced=False, named=True) == {CONTENT}
    found = survivors("data", synced=False, named=True)
    assert {CONTENT, b"", bytes(len(CONTENT))} <= found
    assert any(data and len(data) < len(CONTENT) for data in found)
    assert any(data and len(data) == len(CONTENT) and 0 < data.count(0) < len(data) for data in found)


def test_of_several_changes_of_names_any_subset_may_survive() -> None:
    found = set()
    for seed in range(200):
        disk = Disk()
        client = Client(disk)
        root = client.open_directory("/")
        client.close(client.create_file("old", dir_fd=root))
        client.fsync_directory(root)
        client.link("old", "new", dir_fd=root)
        client.unlink("old", dir_fd=root)
        disk.lose_power(Random(seed), "names")
        found.add(tuple(disk.listing("/")))
    assert found == {("old",), ("new",), ("new", "old"), ()}


def test_a_rename_happens_wholly_or_not_at_all() -> None:
    for seed in SEEDS:
        disk = Disk()
        client = written(disk, synced=True, named=True)
        client.rename("new", "newer", dir_fd=client.open_directory("/"))
        disk.lose_power(Random(seed), "names")
        assert disk.listing("/") in (["new"], ["newer"])


def test_after_a_failed_fsync_the_next_one_succeeds_and_the_bytes_are_lost() -> None:
    disk = Disk()
    client = Client(disk, faults=Faults(rate=0.0))
    root = client.open_directory("/")
    fd = client.create_file("new", dir_fd=root)
    client.fsync_directory(root)
    client.pwrite(fd, CONTENT, 0)
    client.faults = Faults(rate=1.0)
    with pytest.raises(OSError, match="Errno"):
        client.fsync(fd)
    client.faults = Faults()
    client.fsync(fd)
    assert disk.contents("/new") == CONTENT
    disk.lose_power(Random(0), "data")
    assert disk.contents("/new") == bytes(len(CONTENT))


def test_a_killed_client_does_nothing_more_and_what_it_did_is_still_seen() -> None:
    disk = Disk()
    client = written(disk, synced=False, named=False)
    client.faults = Faults(kill_at=client.operations + 1)
    for _ in range(2):
        with pytest.raises(Killed):
            client.open_directory("/")
    assert client.open_files == {}
    assert disk.contents("/new") == CONTENT


def test_locks_exclude_each_other_until_closed_or_killed() -> None:
    disk = Disk()
    client, other = written(disk, synced=True, named=True), Client(disk)
    (fd,) = [fd for fd, opened in client.open_files.items() if not opened.node.is_directory]
    mine = other.open_file("new", dir_fd=other.open_directory("/"))
    assert client.try_lock(fd)
    assert not other.try_lock(mine)
    client.die()
    assert other.try_lock(mine)


def test_another_clients_names_are_seen_late_and_ones_own_at_once() -> None:
    disk = Disk()
    late = Client(disk, 1, Faults(late=True))
    root = late.open_directory("/")
    client = written(disk, synced=True, named=True)
    listings = [late.list_names(root) for _ in range(20)]
    assert [] in listings
    assert ["new"] in listings
    assert client.list_names(client.open_directory("/")) == ["new"]
    late.open_file("new", dir_fd=root)  # listed once, it can be opened for ever
    disk.pass_time()
    assert late.list_names(root) == ["new"]


def test_a_stingy_system_moves_fewer_bytes_and_loses_nothing() -> None:
    disk = Disk()
    client = Client(disk, 3, Faults(stingy=True))
    fd = client.create_file("new", dir_fd=client.open_directory("/"))
    counts = []
    for _ in range(50):
        counts.append(client.pwrite(fd, CONTENT, 0))
    assert min(counts) < max(counts) == len(CONTENT)
    buffer = bytearray(len(CONTENT))
    reads = [client.preadv(fd, [memoryview(buffer)], 0) for _ in range(50)]
    assert min(reads) < max(reads) == len(CONTENT)
    assert buffer == CONTENT


def test_an_operation_may_be_done_and_reported_as_failed() -> None:
    outcomes = set()
    for seed in SEEDS:
        disk = Disk()
        client = written(disk, synced=True, named=True)
        root = client.open_directory("/")
        client._random, client.faults = Random(seed), Faults(rate=1.0)
        with pytest.raises(OSError, match="Errno") as caught:
            client.link("new", "second", dir_fd=root)
        outcomes.add(("second" in disk.listing("/"), caught.value.errno))
    codes = {errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT}
    assert outcomes == {(done, code) for done in (True, False) for code in codes}


def test_the_client_has_every_operation_of_the_seam() -> None:
    operations = {
        name for name, value in vars(FileSystem).items() if callable(value) and not name.startswith("_")
    }
    assert operations <= set(vars(Client))


def test_the_order_of_interleaved_clients_depends_on_the_seed_alone() -> None:
    def order(seed: int) -> list[int]:
        baton, seen = Baton(Random(seed)), list[int]()

        def work(number: int) -> None:
            for _ in range(10):
                seen.append(number)
                baton.switch()

        baton.run([lambda n=n: work(n) for n in range(3)])  # type: ignore[misc]
        return seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(20)}) > 10
    assert sorted(order(5)) == sorted([0, 1, 2] * 10)


def test_a_client_that_fails_fails_the_run() -> None:
    def fail() -> None:
        raise AssertionError("wrong")

    with pytest.raises(AssertionError, match="wrong"):
        Baton(Random(0)).run([fail, lambda: None])


def test_a_block_is_smaller_than_a_header_so_that_headers_can_be_torn() -> None:
    assert BLOCK_BYTES < 1024


def test_the_tables_of_the_document_are_those_of_the_newest_results() -> None:
    """`python tests/trials/table.py` writes them."""
    text = DOCUMENT.read_text()
    assert text == with_tables(text)

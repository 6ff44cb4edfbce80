"""Power loss under real processes, on a mounted disk that forgets what was not synced."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from simulated_client import Client
from simulated_disk import Disk
from trials.fuse.forgetful_disk import Power, forgetful_disk
from trials.power_controls import CONTROLS, Control, find_out
from trials.power_loss import LOSSES, lose_power
from trials.registry import Unavailable

CONTENT = bytes(range(1, 256)) * 20
FIRST_SEED = 274
"""With which every control is found out at the first loss of power, which one process suffers."""
Mounted = tuple[Path, Power]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Mounted]:
    try:
        context = forgetful_disk(tmp_path / "disk")
        power = context.__enter__()
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        yield tmp_path / "disk", power
    finally:
        context.__exit__(None, None, None)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for trials, where a disk can be mounted."""
    try:
        with forgetful_disk(tmp_path / "tried"):
            return tmp_path
    except Unavailable as error:
        pytest.skip(str(error))


def write(path: Path, *, sync: Callable[[int], None] = lambda fd: None) -> None:
    with path.open("wb", buffering=0) as file:
        file.write(CONTENT)
        sync(file.fileno())


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


# ---------------------------------------------------------------- the disk


def test_what_was_synced_survives_and_of_the_rest_anything_may_be_lost(disk: Mounted) -> None:
    folder, power = disk
    for seed in range(20):
        own = folder / str(seed)
        own.mkdir()
        sync_folder(folder)
        write(own / "synced", sync=os.fsync)
        sync_folder(own)
        write(own / "named")
        power.restore(seed, ("names", "data")[seed % 2])
        assert (own / "synced").read_bytes() == CONTENT
    named = [folder / str(seed) / "named" for seed in range(20)]
    assert {path.exists() for path in named[::2]} == {True, False}
    assert {path.read_bytes() == CONTENT for path in named[1::2]} == {True, False}


def test_two_links_are_one_file_and_losing_one_name_leaves_the_other(disk: Mounted) -> None:
    folder, power = disk
    write(folder / "first", sync=os.fsync)
    os.link(folder / "first", folder / "second")
    assert os.path.samefile(folder / "first", folder / "second")
    assert (folder / "second").stat().st_nlink == 2
    sync_folder(folder)
    left = set()
    for seed in range(20):
        os.unlink(folder / "first")
        power.restore(seed, "names")
        assert (folder / "second").read_bytes() == CONTENT
        left.add(first := (folder / "first").exists())
        if not first:
            os.link(folder / "second", folder / "first")
            sync_folder(folder)
    assert left == {True, False}


def test_the_request_at_which_power_is_cut_and_all_later_ones_are_not_done(disk: Mounted) -> None:
    folder, power = disk
    power.cut_after(0)
    for name in ("a", "b"):
        with pytest.raises(OSError, match="Errno 5"):
            (folder / name).mkdir()
    power.wait_until_cut()
    power.restore(0, "data")
    assert os.listdir(folder) == []
    (folder / "a").mkdir()


def test_the_kernel_keeps_nothing_of_a_file_that_a_power_loss_took(disk: Mounted) -> None:
    folder, power = disk
    seen = set()
    for seed in range(20):
        write(folder / f"{seed}")
        assert (folder / f"{seed}").read_bytes() == CONTENT
        power.restore(seed, "names")
        seen.add(f"{seed}" in os.listdir(folder))
        assert (folder / f"{seed}").exists() == (f"{seed}" in os.listdir(folder))
    assert seen == {True, False}


def test_a_simulated_link_and_its_removal_are_counted() -> None:
    disk = Disk()
    client = Client(disk)
    root = client.open_directory("/")
    fd = client.create_file("first", dir_fd=root)
    client.link("first", "second", dir_fd=root)
    assert client.fstat(fd).st_nlink == 2
    client.unlink("first", dir_fd=root)
    client.rename("second", "third", dir_fd=root)
    assert client.fstat(fd).st_nlink == 1


# ---------------------------------------------------------------- the store on it


@pytest.mark.promise("committed survives")
@pytest.mark.parametrize("model", ["names", "data"])
def test_real_processes_that_lose_power_lose_nothing_that_was_acknowledged(place: Path, model: str) -> None:
    assert lose_power(FIRST_SEED, place, model) == LOSSES


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_commit_that_lacks_a_step_is_found_out(place: Path, control: Control) -> None:
    violation = find_out(control, FIRST_SEED, place)
    assert any(word in violation for word in ("torn", "lost", "No such file"))

"""What `info` says of a cache, and what `prune` removes: only what no reader can get."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from store_kit import (
    DAMAGE_WARNING,
    SPEC,
    equal,
    failing,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    save_index,
    shard_path,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache.errors import CacheAccessError, CommitError, CorruptRecordError
from vggt_cache.store import FeatureCache, ShardWriter, create_store, describe, prune, remove_store
from vggt_cache.store.header import parse_header

pytestmark = DAMAGE_WARNING
CAUSAL = make_spec(context="causal")
DAY_S = 24 * 3600


def damage(cache_dir: Path, name: str, *numbers: int) -> None:
    """Flip a bit in the payloads of these numbers."""
    path = shard_path(cache_dir, name)
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    for record in parse_header(bytes(data), name).records:
        if record.key in map(make_key, numbers):
            data[record.offset + 5] ^= 16
    path.write_bytes(data)


def spoil_header(cache_dir: Path, name: str) -> None:
    path = shard_path(cache_dir, name)
    path.chmod(0o644)
    path.write_bytes(b"\xff" * 100 + path.read_bytes()[100:])


def leave_temp_file(
    folder: Path, age_s: float, size: int = 1000, name: str = ".tmp-0123456789abcdef"
) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    now = path.stat().st_mtime
    os.utime(path, (now - age_s, now - age_s))
    return path


def contents(cache_dir: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in cache_dir.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- describe


def test_describe_adds_up_a_cache_by_specification(tmp_path: Path) -> None:
    write_shard(tmp_path, range(5))
    write_shard(tmp_path, range(3, 8))
    superseded = write_shard(tmp_path, [20])
    write_shard(tmp_path, [20, 21])
    write_shard(tmp_path, range(2), CAUSAL)
    index = save_index(tmp_path, CAUSAL)
    bad = write_shard(tmp_path, [30])
    spoil_header(tmp_path, bad)
    leave_temp_file(shards_dir(tmp_path), 2 * DAY_S)
    leave_temp_file(shards_dir(tmp_path), 60, name=".tmp-00000000deadbeef")
    with no_descriptor_leaks():
        found = {store.spec.context: store for store in describe(tmp_path).stores}
    frame, causal = found["frame"], found["causal"]
    assert (frame.entries, frame.shards, frame.superseded_records, frame.temp_files) == (11, 5, 3, 1)
    assert (causal.entries, causal.shards, causal.superseded_records, causal.temp_files) == (2, 1, 0, 0)
    assert [name for name, _ in frame.damaged_shards] == [bad]
    size = {path.name: path.stat().st_size for path in shards_dir(tmp_path).iterdir()}
    assert frame.disk_bytes == sum(size.values()) - size[".tmp-00000000deadbeef"]
    rescued = make_feature(30).nbytes
    assert frame.reclaimable_bytes == 1000 + size[superseded] + size[bad] - rescued
    assert (frame.indexed, causal.indexed) == (False, True)
    assert causal.disk_bytes == index.stat().st_size + sum(
        path.stat().st_size for path in shards_dir(tmp_path, CAUSAL).iterdir()
    )
    assert frame.path == str(tmp_path / SPEC.short_name)


def test_describe_and_a_dry_run_change_nothing(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    damage(tmp_path, write_shard(tmp_path, range(3)), 1)
    spoil_header(tmp_path, write_shard(tmp_path, [9]))
    leave_temp_file(shards_dir(tmp_path), 2 * DAY_S)
    before = contents(tmp_path)
    describe(tmp_path)
    assert len(prune(tmp_path, damaged=True)) == 3
    assert contents(tmp_path) == before


def test_what_a_dry_run_names_is_what_is_done(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    write_shard(tmp_path, range(3))
    damage(tmp_path, write_shard(tmp_path, range(10, 14)), 11)
    spoil_header(tmp_path, write_shard(tmp_path, [9]))
    leave_temp_file(shards_dir(tmp_path), 2 * DAY_S)
    planned = prune(tmp_path, damaged=True)
    assert prune(tmp_path, damaged=True, dry_run=False) == planned
    assert len(planned) == 4
    assert not any(Path(action.path).exists() for action in planned)
    assert all(action.reason and action.bytes >= 0 for action in planned)
    assert prune(tmp_path, damaged=True) == []


# ---------------------------------------------------------------- temporary files


def test_old_temporary_files_are_removed_wherever_they_were_left(tmp_path: Path) -> None:
    store_dir = create_store(tmp_path, SPEC)
    write_shard(tmp_path, [1])
    index_dir = save_index(tmp_path).parent
    old = [leave_temp_file(folder, DAY_S + 60) for folder in (store_dir, shards_dir(tmp_path), index_dir)]
    young = leave_temp_file(shards_dir(tmp_path), DAY_S - 60, name=".tmp-00000000deadbeef")
    strange = leave_temp_file(shards_dir(tmp_path), 9 * DAY_S, name=".tmp-mine")
    assert sorted(action.path for action in prune(tmp_path, dry_run=False)) == sorted(map(str, old))
    assert temp_files(tmp_path) == [young, strange] or temp_files(tmp_path) == [strange, young]
    assert [action.path for action in prune(tmp_path, dry_run=False, min_age_s=60)] == [str(young)]


def test_the_file_of_a_living_writer_is_not_removed_however_old_it_looks(tmp_path: Path) -> None:
    with ShardWriter(create_store(tmp_path, SPEC), SPEC) as writer:
        writer.append(make_key(1), make_feature(1))
        (path,) = temp_files(tmp_path)
        os.utime(path, (0, 0))
        assert prune(tmp_path, dry_run=False) == []
        writer.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


def test_the_file_of_a_dead_writer_is_removed_when_it_is_old(tmp_path: Path) -> None:
    store_dir = create_store(tmp_path, SPEC)
    process = os.fork()
    if process == 0:
        ShardWriter(store_dir, SPEC).append(make_key(1), make_feature(1))
        os._exit(0)
    os.waitpid(process, 0)
    (path,) = temp_files(tmp_path)
    assert prune(tmp_path, dry_run=False) == []
    os.utime(path, (0, 0))
    assert [action.path for action in prune(tmp_path, dry_run=False)] == [str(path)]
    assert temp_files(tmp_path) == []


def test_a_second_name_of_a_committed_shard_frees_nothing_and_takes_nothing(tmp_path: Path) -> None:
    name = write_shard(tmp_path, [1], fs=failing("unlink", errno.EIO))
    (path,) = temp_files(tmp_path)
    os.utime(path, (0, 0))
    (action,) = prune(tmp_path, dry_run=False)
    assert (action.path, action.bytes) == (str(path), 0)
    assert os.listdir(shards_dir(tmp_path)) == [name]
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


# ---------------------------------------------------------------- superseded shards


def test_a_shard_of_which_every_record_is_superseded_is_removed(tmp_path: Path) -> None:
    gone = write_shard(tmp_path, [1, 2])
    kept = [write_shard(tmp_path, [1, 3]), write_shard(tmp_path, [2, 4])]
    write_shard(tmp_path, [1], CAUSAL)
    with FeatureCache.open(tmp_path, spec=SPEC) as cache:
        served = {key: cache.shard_of(key) for key in cache}
    (action,) = prune(tmp_path, dry_run=False)
    assert action.path == str(shard_path(tmp_path, gone))
    assert sorted(os.listdir(shards_dir(tmp_path))) == kept
    with FeatureCache.open(tmp_path, spec=SPEC) as cache:
        assert {key: cache.shard_of(key) for key in cache} == served
        assert holds(cache, range(1, 5))


@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_superseded_shard_stays_when_what_supersedes_it_is_damaged(tmp_path: Path, how: str) -> None:
    write_shard(tmp_path, [1, 2])
    later = write_shard(tmp_path, [1, 2])
    damage(tmp_path, later, 2)
    if how == "cut":
        os.truncate(shard_path(tmp_path, later), shard_path(tmp_path, later).stat().st_size - 1)
    before = contents(tmp_path)
    assert prune(tmp_path, dry_run=False) == []
    assert {name: data for name, data in contents(tmp_path).items() if "index" not in name} == before


def test_pruning_leaves_an_index_that_readers_use(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    write_shard(tmp_path, [1, 2])
    save_index(tmp_path)
    prune(tmp_path, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.unindexed_shards == ()
        assert holds(cache, [1, 2])


# ---------------------------------------------------------------- damaged shards


def test_without_being_asked_damage_is_left_alone(tmp_path: Path) -> None:
    damage(tmp_path, write_shard(tmp_path, [1, 2]), 1)
    spoil_header(tmp_path, write_shard(tmp_path, [3]))
    before = contents(tmp_path)
    assert prune(tmp_path, dry_run=False) == []
    assert contents(tmp_path) == before


@pytest.mark.parametrize("indexed", [True, False])
def test_the_intact_records_of_a_damaged_shard_are_kept(tmp_path: Path, indexed: bool) -> None:
    bad = write_shard(tmp_path, range(6))
    write_shard(tmp_path, [7])
    if indexed:
        save_index(tmp_path)
    damage(tmp_path, bad, 2, 4)
    (action,) = prune(tmp_path, damaged=True, dry_run=False)
    assert action.path == str(shard_path(tmp_path, bad))
    assert "2 of its records are damaged" in action.reason
    assert not shard_path(tmp_path, bad).exists()
    with FeatureCache.open(tmp_path, use_index=indexed) as cache:
        assert holds(cache, [0, 1, 3, 5, 7])
    write_shard(tmp_path, [2, 4])
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [*range(6), 7])


def test_a_cut_shard_keeps_the_records_before_the_cut(tmp_path: Path) -> None:
    name = write_shard(tmp_path, range(6))
    os.truncate(shard_path(tmp_path, name), shard_path(tmp_path, name).stat().st_size - 100)
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(3))


def test_shards_without_a_readable_header_are_removed(tmp_path: Path) -> None:
    bad = [write_shard(tmp_path, [n]) for n in (1, 2)]
    spoil_header(tmp_path, bad[0])
    shard_path(tmp_path, bad[1]).chmod(0o644)
    os.truncate(shard_path(tmp_path, bad[1]), 0)
    write_shard(tmp_path, [3])
    actions = prune(tmp_path, damaged=True, dry_run=False)
    assert sorted(action.path for action in actions) == sorted(
        str(shard_path(tmp_path, name)) for name in bad
    )
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 3])  # of the other nothing was left
        assert cache.damaged_shards == ()


def test_an_older_intact_copy_comes_back_when_the_served_one_is_damaged(tmp_path: Path) -> None:
    older = make_feature(100)
    first = write_shard(tmp_path, {1: older, 2: make_feature(2), 3: make_feature(3)})
    second = write_shard(tmp_path, {1: make_feature(1), 2: make_feature(200)})
    damage(tmp_path, second, 1)
    damage(tmp_path, first, 3)
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert len(cache) == 2
        assert equal(cache.get_by_key(make_key(1)), older)
        assert equal(cache.get_by_key(make_key(2)), make_feature(200))


def test_a_copy_that_was_not_served_does_not_become_the_served_one_by_moving(tmp_path: Path) -> None:
    damage(tmp_path, write_shard(tmp_path, {2: make_feature(2), 3: make_feature(3), 4: make_feature(4)}), 3)
    write_shard(tmp_path, {2: make_feature(200)})
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert len(cache) == 2
        assert equal(cache.get_by_key(make_key(2)), make_feature(200))


def as_of_a_later_version(shard: bytes, key: bytes) -> bytes:
    """Its checksums cover something else, as those of every later version do."""
    checksum = re.search(f'"{key.hex()}":"([0-9a-f]{{32}})"'.encode(), shard)
    assert checksum is not None
    shard = shard.replace(checksum[1], checksum[1][::-1])
    return shard.replace(b'"format_version":"1"', b'"format_version":"3"')


def test_what_may_be_somebodys_good_data_is_never_removed(tmp_path: Path) -> None:
    """A shard of a later format, of another store, a link, a file of another name."""
    write_shard(tmp_path, [1])
    newer = shard_path(tmp_path, write_shard(tmp_path, [2]))
    newer.chmod(0o644)
    newer.write_bytes(as_of_a_later_version(newer.read_bytes(), make_key(2)))
    foreign = write_shard(tmp_path, [3], CAUSAL)
    shutil.copy(shard_path(tmp_path, foreign, CAUSAL), shards_dir(tmp_path))
    (shards_dir(tmp_path) / "0123456789ab-0123456789abcdef.safetensors").symlink_to(newer)
    os.mkfifo(shards_dir(tmp_path) / "0123456789ab-00000000deadbeef.safetensors")
    (shards_dir(tmp_path) / "notes.txt").write_text("mine")
    before = sorted(os.listdir(shards_dir(tmp_path)))
    assert prune(tmp_path, damaged=True, dry_run=False) == []
    assert sorted(os.listdir(shards_dir(tmp_path))) == before
    frame = next(store for store in describe(tmp_path).stores if store.spec == SPEC)
    assert len(frame.damaged_shards) == 4
    assert frame.reclaimable_bytes == 0


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "link", "fsync_directory"])
def test_a_repair_that_fails_removes_nothing(tmp_path: Path, operation: str) -> None:
    bad = write_shard(tmp_path, range(4))
    damage(tmp_path, bad, 2)
    with no_descriptor_leaks(), pytest.raises(CommitError):
        prune(tmp_path, damaged=True, dry_run=False, fs=failing(operation, errno.ENOSPC))
    left = os.listdir(shards_dir(tmp_path))
    assert bad in left
    assert left == [bad] or operation == "fsync_directory", "only a shard that has its name is not taken back"
    with FeatureCache.open(tmp_path) as cache:
        assert equal(cache.get_by_key(make_key(3)), make_feature(3))
        with pytest.raises(CorruptRecordError):
            cache.get_by_key(make_key(2))


def test_a_repair_commits_before_it_removes(tmp_path: Path) -> None:
    """Stopped between the two, nothing is lost: the records are there twice."""
    bad = write_shard(tmp_path, range(4))
    damage(tmp_path, bad, 2)
    fs = failing("unlink", errno.EIO, nth=1)  # the first drops the new shard's temporary name
    with pytest.raises(CacheAccessError, match="fault"):
        prune(tmp_path, damaged=True, dry_run=False, fs=fs)
    assert len(os.listdir(shards_dir(tmp_path))) == 2
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [0, 1, 3])


def test_two_repairs_at_once_lose_nothing(tmp_path: Path) -> None:
    for first in range(0, 20, 5):
        damage(tmp_path, write_shard(tmp_path, range(first, first + 5)), first)
    processes = []
    for _ in range(2):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                prune(tmp_path, damaged=True, dry_run=False)
                status = 0
            finally:
                os._exit(status)
        processes.append(process)
    for process in processes:
        os.waitpid(process, 0)
    prune(tmp_path, damaged=True, dry_run=False)
    with FeatureCache.open(tmp_path, use_index=False) as cache:
        assert holds(cache, [n for n in range(20) if n % 5])


def test_a_damaged_shard_goes_only_after_the_later_ones_that_hold_its_records(tmp_path: Path) -> None:
    first = write_shard(tmp_path, {1: make_feature(1), 2: make_feature(2)})
    second = write_shard(tmp_path, {1: make_feature(100), 3: make_feature(3)})
    damage(tmp_path, first, 2)
    damage(tmp_path, second, 3)
    removed = [os.path.basename(action.path) for action in prune(tmp_path, damaged=True, dry_run=False)]
    assert removed == [second, first]
    with FeatureCache.open(tmp_path) as cache:
        assert equal(cache.get_by_key(make_key(1)), make_feature(100))


# ---------------------------------------------------------------- one specification


def test_a_specification_is_removed_with_all_its_features_and_no_other(tmp_path: Path) -> None:
    for spec in (SPEC, CAUSAL):
        write_shard(tmp_path, [1, 2], spec)
        save_index(tmp_path, spec)
    before = sorted(path for path in tmp_path.rglob("*"))
    shown = remove_store(tmp_path, CAUSAL)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert remove_store(tmp_path, CAUSAL, dry_run=False) == shown
    assert not (tmp_path / CAUSAL.short_name).exists()
    with FeatureCache.open(tmp_path) as cache:
        assert cache.spec == SPEC
        assert len(cache) == 2


def test_what_does_not_belong_to_a_store_stays(tmp_path: Path) -> None:
    write_shard(tmp_path, [1], CAUSAL)
    mine = tmp_path / CAUSAL.short_name / "notes.txt"
    mine.write_text("mine")
    remove_store(tmp_path, CAUSAL, dry_run=False)
    assert [path.name for path in (tmp_path / CAUSAL.short_name).iterdir()] == ["notes.txt"]


def test_a_specification_that_is_being_written_is_not_removed(tmp_path: Path) -> None:
    write_shard(tmp_path, [1], CAUSAL)
    with ShardWriter(tmp_path / CAUSAL.short_name, CAUSAL) as writer:
        writer.append(make_key(2), make_feature(2))
        with pytest.raises(CacheAccessError, match="being written by another process"):
            remove_store(tmp_path, CAUSAL, dry_run=False)
        writer.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert len(cache) == 2

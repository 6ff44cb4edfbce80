"""Records of a cache on a disk of this machine: the same bytes, up to a limit, and never a reason not to train."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from small_data import write_image
from store_kit import (
    SPEC,
    equal,
    failing,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache import Staging
from vggt_cache.cli import main
from vggt_cache.errors import CommitError, SettingsError
from vggt_cache.identity import FeatureSpec, feature_key, frame_digest
from vggt_cache.store import FeatureCache, FileSystem
from vggt_cache.store import read_through as read_through_module
from vggt_cache.store.record import Record
from vggt_cache.store.staged import StagedRecords

LARGE = make_spec(embed_dim=8192)
"""A feature of it has 192 KiB, so that headers of shards weigh little."""


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    """Ten features in two shards."""
    write_shard(tmp_path / "cache", range(5))
    write_shard(tmp_path / "cache", range(5, 10))
    return tmp_path / "cache"


@pytest.fixture
def local_dir(tmp_path: Path) -> Path:
    return tmp_path / "nvme" / "features"


def staged(cache_dir: Path, local_dir: Path, *more: str) -> int:
    return main(["stage", str(cache_dir), str(local_dir), "--context", "frame", *more])


def opened(cache_dir: Path, local_dir: Path, limit: int | str | None = None) -> FeatureCache:
    return FeatureCache.open(cache_dir, context="frame", stage=Staging(local_dir=local_dir, limit=limit))


def read_all(cache: FeatureCache) -> tuple[int, int]:
    """Read and check all; how many came from this machine, and how many from the cache."""
    before = cache.stats
    for number in range(10):
        assert equal(cache.get_by_key(make_key(number)), make_feature(number, cache.spec))
    after = cache.stats
    local = after.staged_hits - before.staged_hits
    return local, after.hits - before.hits - local


def bytes_in_shards(local_dir: Path, spec: FeatureSpec = SPEC) -> int:
    return sum(path.stat().st_size for path in shards_dir(local_dir, spec).iterdir())


def record_bytes(cache_dir: Path, record: tuple[str, Record]) -> bytes:
    name, found = record
    (store,) = cache_dir.glob("frame-*")
    with open(store / "shards" / name, "rb") as file:
        file.seek(found.offset)
        return file.read(found.stored_bytes or make_feature(0).nbytes)


# ---------------------------------------------------------------- copied ahead


def test_what_is_staged_is_a_store_with_the_same_bytes(cache_dir: Path, local_dir: Path) -> None:
    assert staged(cache_dir, local_dir) == 0
    with FeatureCache.open(cache_dir, spec=SPEC) as cache, FeatureCache.open(local_dir, spec=SPEC) as local:
        assert holds(local, range(10))
        for key in cache:
            (ours,), (theirs,) = local.copies_of(key), cache.copies_of(key)
            assert record_bytes(local_dir, ours) == record_bytes(cache_dir, theirs)
            assert ours[1].checksum == theirs[1].checksum
        assert local.unindexed_shards == ()
    assert main(["verify", str(local_dir)]) == 0


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_packed_records_are_staged_as_they_are(
    tmp_path: Path, local_dir: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("zstandard")
    spec = make_spec(feature_dtype="int8" if codec == "int8" else "bfloat16", embed_dim=64)
    features = {number: make_feature(number, make_spec(embed_dim=64)) for number in range(3)}
    if codec == "int8":
        from vggt_cache.codec.quantise import quantised

        with_records = {n: (list(f.shape), quantised(f.flatten(0, -2))[0]) for n, f in features.items()}
        from vggt_cache.store import ShardWriter, create_store

        with ShardWriter(create_store(tmp_path / "cache", spec), spec) as writer:
            for number, (shape, record) in with_records.items():
                writer.append_record(make_key(number), shape, record)
            writer.commit()
    else:
        write_shard(tmp_path / "cache", features, spec, codec="lossless")
    assert staged(tmp_path / "cache", local_dir) == 0
    with (
        FeatureCache.open(tmp_path / "cache", spec=spec) as cache,
        opened(tmp_path / "cache", local_dir) as both,
    ):
        for key in cache:
            assert equal(both.get_by_key(key), cache.get_by_key(key))  # type: ignore[arg-type]
        assert both.stats.staged_hits == both.stats.hits == 3


def test_a_second_time_nothing_is_copied(
    cache_dir: Path, local_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert staged(cache_dir, local_dir) == 0
    before = sorted(shards_dir(local_dir).iterdir())
    write_shard(cache_dir, [10])
    assert staged(cache_dir, local_dir) == 0
    assert f"Copied 1 feature: 11 of 11 are in {local_dir}\n" in capsys.readouterr().out
    assert staged(cache_dir, local_dir) == 0
    assert f"Copied 0 features: 11 of 11 are in {local_dir}\n" in capsys.readouterr().out
    assert len(list(shards_dir(local_dir).iterdir())) == len(before) + 1


@pytest.mark.parametrize("limit", ["500000", "1MB", "1M"])
def test_the_limit_holds_and_is_told_with_the_share_of_local_reads(
    tmp_path: Path, local_dir: Path, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir = tmp_path / "cache"
    write_shard(cache_dir, range(10), LARGE)
    assert staged(cache_dir, local_dir, "--limit", limit) == 0
    limit_bytes = Staging(local_dir=local_dir, limit=limit).limit_bytes or 0
    told = capsys.readouterr().out
    with opened(cache_dir, local_dir, limit) as cache:
        local, others = read_all(cache)
    used = bytes_in_shards(local_dir, LARGE)
    assert limit_bytes - 2 * make_feature(0, LARGE).nbytes < used <= limit_bytes
    assert 0 < local < 10
    assert local + others == 10
    assert (
        f"{others} others are read from {cache_dir}, about {others * 10}% of the reads of each epoch" in told
    )
    assert "nothing is evicted, so about" in told


def test_a_limit_below_one_record_stages_nothing_and_stops_nothing(
    cache_dir: Path, local_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert staged(cache_dir, local_dir, "--limit", "1000") == 0
    assert f"Copied 0 features: 0 of 10 are in {local_dir}\n" in capsys.readouterr().out
    with opened(cache_dir, local_dir, 1000) as cache:
        assert (read_all(cache), read_all(cache)) == ((0, 10), (0, 10))
    assert temp_files(local_dir) == []


def test_the_limit_is_of_all_stores_and_of_what_is_being_written(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(local_dir, range(3), make_spec(context="causal"))
    other = sum(path.stat().st_size for path in local_dir.rglob("*.safetensors"))
    records = StagedRecords(Staging(local_dir=local_dir, limit=other + 500_000), SPEC)
    assert records.room_bytes() == 500_000
    monkeypatch.setenv("VGGT_CACHE_SHARD_BYTES", "200000")
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        assert records.append(*cache.stored(make_key(0)))  # type: ignore[misc]
    assert records.room_bytes() == 300_000
    records.commit()
    assert records.room_bytes() == 500_000 - bytes_in_shards(local_dir)
    records.close()


def test_without_a_limit_a_tenth_of_the_disk_stays_free(
    cache_dir: Path, local_dir: Path, small_disk: Path
) -> None:
    """Of one MiB, in which a file of ours takes 700 KB."""
    (small_disk / "something else").write_bytes(bytes(700_000))
    records = StagedRecords(Staging(local_dir=small_disk / "stage"), SPEC)
    disk = os.statvfs(small_disk)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    assert records.room_bytes() == free - total // 10
    records.close()


def test_only_what_some_data_needs_is_staged(tmp_path: Path, local_dir: Path) -> None:
    cache_dir, data = tmp_path / "cache", tmp_path / "data"
    data.mkdir()
    keys = [
        feature_key(SPEC, [frame_digest(write_image(data / f"{n}.png", n).read_bytes())]) for n in range(4)
    ]
    from vggt_cache.store import ShardWriter, create_store

    with ShardWriter(create_store(cache_dir, SPEC), SPEC) as writer:
        for number, key in enumerate(keys):
            writer.append(key, make_feature(number))
        writer.commit()
    (data / "some.json").write_text('[{"id": "0", "images": ["1.png", "3.png"], "conversations": []}]')
    flags = ["--annotation_path", str(data / "some.json"), "--data_path", str(data)]
    assert staged(cache_dir, local_dir, *flags) == 0
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert sorted(local) == sorted([keys[1], keys[3]])


def test_a_damaged_record_of_the_cache_is_told_and_left_out(
    cache_dir: Path, local_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(cache_dir, make_key(3))
    assert staged(cache_dir, local_dir) == 3
    assert f"not staged: {make_key(3).hex()}: " in capsys.readouterr().out
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert holds(local, {*range(10)} - {3})


def damage(cache_dir: Path, key: bytes) -> Path:
    """Flip a bit of the record that is served."""
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        name, record = cache.copies_of(key)[0]
    path = shards_dir(cache_dir) / name
    path.chmod(0o644)
    with open(path, "r+b") as file:
        file.seek(record.offset)
        byte = file.read(1)[0]
        file.seek(record.offset)
        file.write(bytes([byte ^ 1]))
    return path


# ---------------------------------------------------------------- several processes, and their end


def stage_command(cache_dir: Path, local_dir: Path) -> list[str]:
    return [sys.executable, "-m", "vggt_cache", "stage", str(cache_dir), str(local_dir), "--context", "frame"]


def test_two_that_stage_at_once_share_a_store(cache_dir: Path, local_dir: Path) -> None:
    """Threads stand for processes: nothing of a process is shared by what they use."""
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        both = [StagedRecords(Staging(local_dir=local_dir), SPEC) for _ in range(2)]
        start = threading.Barrier(2)

        def stage(records: StagedRecords) -> None:
            start.wait()
            for number in range(10):
                assert records.append(*cache.stored(make_key(number)))  # type: ignore[misc]
                if number % 3 == 2:
                    records.commit()
            records.commit()

        threads = [threading.Thread(target=stage, args=[records]) for records in both]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for records in both:
        records.refresh()
        assert len(records) == 10
        records.close()
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert holds(local, range(10))
    assert temp_files(local_dir) == []


def test_what_another_has_committed_is_not_copied_again(cache_dir: Path, local_dir: Path) -> None:
    first, second = (StagedRecords(Staging(local_dir=local_dir), SPEC) for _ in range(2))
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        for number in range(10):
            first.append(*cache.stored(make_key(number)))  # type: ignore[misc]
        first.commit()
        second.refresh()
        for number in range(10):
            assert second.append(*cache.stored(make_key(number)))  # type: ignore[misc]
        second.commit()
    assert len(list(shards_dir(local_dir).iterdir())) == 1
    first.close()
    second.close()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_from_what_is_committed(
    tmp_path: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes, each killed four times; then one that ends."""
    spec, cache_dir = make_spec(embed_dim=4096), tmp_path / "cache"
    for start in range(0, 1000, 100):
        write_shard(cache_dir, range(start, start + 100), spec)
    monkeypatch.setenv("VGGT_CACHE_SHARD_BYTES", "300K")
    seen = 0
    for attempt in range(4):
        running = [
            subprocess.Popen(
                stage_command(cache_dir, local_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            for _ in range(2)
        ]
        folder, before = shards_dir(local_dir, spec), seen
        while all(one.poll() is None for one in running) and seen <= before + attempt:
            seen = len(list(folder.glob("*.safetensors"))) if folder.is_dir() else 0
            time.sleep(0.01)
        for one in running:
            one.send_signal(signal.SIGKILL)
            one.wait()
        with FeatureCache.open(local_dir, spec=spec) as local:
            assert all(local.verify_record(key) for key in local)
    for path in temp_files(local_dir):
        os.utime(path, (0, 0))
    assert subprocess.run(stage_command(cache_dir, local_dir)).returncode == 0
    with FeatureCache.open(local_dir, spec=spec) as local:
        assert holds(local, range(1000))
    assert temp_files(local_dir) == []


def test_a_stopped_one_commits_what_it_has(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append, count = StagedRecords.append, 0

    def stopping(records: StagedRecords, record: Record, stored: memoryview) -> bool:
        nonlocal count
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGTERM)
        return append(records, record, stored)

    monkeypatch.setattr(StagedRecords, "append", stopping)
    assert staged(cache_dir, local_dir, "--num_workers", "1") == 143
    assert "Stopped by SIGTERM: run the same command again to go on" in capsys.readouterr().out
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert len(local) == 4


def test_what_a_killed_process_was_writing_is_removed_and_a_living_ones_is_not(
    cache_dir: Path, local_dir: Path
) -> None:
    records = StagedRecords(Staging(local_dir=local_dir), SPEC)
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        records.append(*cache.stored(make_key(0)))  # type: ignore[misc]
    (alive,) = temp_files(local_dir)
    dead, young = (shards_dir(local_dir) / f".tmp-{digit * 16}" for digit in "12")
    dead.write_bytes(bytes(10))
    young.write_bytes(bytes(10))
    for path in (alive, dead):
        os.utime(path, (0, 0))
    StagedRecords(Staging(local_dir=local_dir), SPEC).close()
    assert sorted(temp_files(local_dir)) == sorted([alive, young])
    records.close()


# ---------------------------------------------------------------- what cannot be written


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "link", "create_file"])
def test_a_full_disk_leaves_what_is_committed(cache_dir: Path, local_dir: Path, operation: str) -> None:
    faulty = StagedRecords(Staging(local_dir=local_dir), SPEC)
    faulty._fs = failing(operation, errno.ENOSPC, nth=5 if operation == "pwrite" else 1)

    def stage_all(cache: FeatureCache) -> None:
        for number in range(10):
            faulty.append(*cache.stored(make_key(number)))  # type: ignore[misc]
            if number % 3 == 2:
                faulty.commit()

    with (
        FeatureCache.open(cache_dir, spec=SPEC) as cache,
        pytest.raises(CommitError, match="the disk is full: free some space"),
    ):
        stage_all(cache)
    faulty.close()
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert 3 <= len(local) < 10
        assert all(local.verify_record(key) for key in local)
    assert staged(cache_dir, local_dir) == 0


def test_the_command_on_a_full_disk_ends_with_a_sentence(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk(monkeypatch)
    assert staged(cache_dir, local_dir) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[ERROR]")]
    assert "what was committed before is untouched: the disk is full" in line


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fs: FileSystem, fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystem, "fsync", fsync)


def test_reading_goes_on_where_the_local_disk_is_full(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert staged(cache_dir, local_dir) == 0
    write_shard(cache_dir, [10, 11])
    with opened(cache_dir, local_dir) as cache:
        full_disk(monkeypatch)
        for number in (10, 11, 3):
            assert equal(cache.get_by_key(make_key(number)), make_feature(number))
        with pytest.warns(UserWarning, match="nothing more is staged here.*the disk is full") as told:
            cache.close()
        assert len(told) == 1
        assert cache.stats.staged_hits == 1
    assert temp_files(local_dir) == []


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"local_dir": "s3://bucket/x"}, "lies in a bucket"),
        ({"local_dir": ""}, "is empty"),
        ({"local_dir": "x", "limit": "many"}, "'many', which is not a size"),
        ({"local_dir": "x", "limit": 0}, "0, which is not a size"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        Staging(**given)  # type: ignore[arg-type]


def test_a_cache_cannot_be_its_own_stage(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache_dir)
    with pytest.raises(SettingsError, match="is the cache itself"):
        opened(cache_dir, tmp_path / "link")
    assert staged(cache_dir, cache_dir) == 2


def test_a_place_where_nothing_can_be_made_is_refused_at_the_start(cache_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CommitError):
        opened(cache_dir, tmp_path / "file")


# ---------------------------------------------------------------- read through


def test_the_second_epoch_reads_nothing_from_the_cache(cache_dir: Path, local_dir: Path) -> None:
    with no_descriptor_leaks():
        with opened(cache_dir, local_dir) as cache:
            assert read_all(cache) == (0, 10)
        with opened(cache_dir, local_dir) as cache:
            assert read_all(cache) == (10, 0)
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert holds(local, range(10))
    assert len(list(shards_dir(local_dir).iterdir())) == 1


def test_within_a_run_it_does_so_as_soon_as_it_is_committed(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_through_module, "COMMIT_S", 0.1)
    with opened(cache_dir, local_dir) as cache:
        assert read_all(cache) == (0, 10)
        until_s = time.monotonic() + 30
        while cache.staged and len(cache.staged.records or ()) < 10 and time.monotonic() < until_s:
            time.sleep(0.01)
        assert read_all(cache) == (10, 0)
        cache.get_by_key(make_key(99))
        assert cache.stats.misses == 1


def test_only_the_same_record_is_served_from_here(cache_dir: Path, local_dir: Path) -> None:
    """One that was computed again has other bytes under its key; one that is gone from the cache is none."""
    assert staged(cache_dir, local_dir) == 0
    again = make_feature(0) + 1
    write_shard(cache_dir, {0: again})
    with opened(cache_dir, local_dir) as cache:
        assert equal(cache.get_by_key(make_key(0)), again)
        assert cache.stats.staged_hits == 0
    with opened(cache_dir, local_dir) as cache:  # that one was kept
        assert equal(cache.get_by_key(make_key(0)), again)
        assert cache.stats.staged_hits == 1
    emptied = cache_dir.parent / "emptied"
    write_shard(emptied, [1])
    with opened(emptied, local_dir) as cache:
        assert cache.get_by_key(make_key(2)) is None


def test_stores_of_other_specifications_lie_beside_each_other(cache_dir: Path, local_dir: Path) -> None:
    other = make_spec(context="causal")
    write_shard(cache_dir, range(10), other)
    assert staged(cache_dir, local_dir) == 0
    with FeatureCache.open(cache_dir, spec=other, stage=Staging(local_dir=local_dir)) as cache:
        assert read_all(cache) == (0, 10)
    with opened(cache_dir, local_dir) as cache:
        assert read_all(cache) == (10, 0)


@pytest.mark.parametrize("remains", [True, False])
def test_a_damaged_local_record_is_read_from_the_cache_and_told_once(
    cache_dir: Path, local_dir: Path, remains: bool
) -> None:
    assert staged(cache_dir, local_dir) == 0
    path = damage(local_dir, make_key(3))
    damage(local_dir, make_key(4))
    if not remains:
        path.unlink()  # by somebody, while it is in use
    with opened(cache_dir, local_dir) as cache, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert read_all(cache)[0] < 10
        assert read_all(cache)[0] < 10
    assert len([one for one in told if "staged record" in str(one.message)]) == remains
    with opened(cache_dir, local_dir) as cache:  # kept anew
        assert read_all(cache) == (10, 0)


def test_what_comes_faster_than_it_is_written_waits_for_the_next_epoch(
    cache_dir: Path, local_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_through_module, "_WAITING_BYTES", 2 * make_feature(0).nbytes)
    go_on, write = threading.Event(), StagedRecords.append

    def slow(records: StagedRecords, record: Record, stored: memoryview) -> bool:
        go_on.wait()
        return write(records, record, stored)

    monkeypatch.setattr(StagedRecords, "append", slow)
    with opened(cache_dir, local_dir) as cache:
        assert read_all(cache) == (0, 10)
        go_on.set()
    with FeatureCache.open(local_dir, spec=SPEC) as local:
        assert 1 <= len(local) <= 2


def test_a_cache_that_went_to_another_process_stages_there(cache_dir: Path, local_dir: Path) -> None:
    def read(cache: FeatureCache, numbers: range) -> int:
        for number in numbers:
            assert equal(cache.get_by_key(make_key(number)), make_feature(number))
        return cache.stats.staged_hits

    with opened(cache_dir, local_dir, "1GB") as cache:
        make, named = cache.__reduce__()  # as spawn does
        with make(*named) as again:
            assert again.staging == cache.staging
            read(again, range(2))
        read(cache, range(2, 5))  # of which nothing is committed yet
        pid = os.fork()
        if pid == 0:  # the thread of the parent is not here, and its shard not ours
            code = 1
            try:
                read(cache, range(5, 8))
                cache.close()
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        with opened(cache_dir, local_dir) as then:
            assert read(then, range(10)) == 5
    with opened(cache_dir, local_dir) as then:
        assert read(then, range(10)) == 10


def test_what_is_found_in_another_store_of_the_directory_is_staged_too(
    tmp_path: Path, local_dir: Path
) -> None:
    """A cache of given pixels finds features that were made from files, and the other way round."""
    spec = make_spec()
    write_shard(tmp_path / "cache", range(10), spec.of_given_pixels)
    write_shard(tmp_path / "cache", [20], spec)
    for expected in ((0, 10), (10, 0)):
        with FeatureCache.open(tmp_path / "cache", spec=spec, stage=Staging(local_dir=local_dir)) as cache:
            assert read_all(cache) == expected


def test_pruning_what_is_staged_harms_nothing(cache_dir: Path, local_dir: Path) -> None:
    assert staged(cache_dir, local_dir) == 0
    damage(local_dir, make_key(3))
    with opened(cache_dir, local_dir) as cache:
        assert main(["prune", str(local_dir), "--damaged", "--yes"]) == 0
        assert sum(read_all(cache)) == 10
        cache.refresh()
    assert main(["verify", str(local_dir)]) == 0

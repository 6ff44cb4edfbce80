"""How a shard comes to be: the order of a commit, and what is left when a step of it fails."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from store_kit import (
    SPEC,
    Call,
    TracedFileSystem,
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
from vggt_cache.errors import CommitError, SettingsError, SpecMismatchError
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.filesystem import Buffer
from vggt_cache.store.writer import next_shard_name


def commit_two(cache_dir: Path, fs: FileSystem) -> str:
    with ShardWriter(create_store(cache_dir, SPEC), SPEC, fs=fs) as writer:
        writer.append(make_key(1), make_feature(1))
        writer.append(make_key(2), make_feature(2))
        return writer.commit()


def clean_operations(cache_dir: Path) -> list[str]:
    fs = TracedFileSystem()
    commit_two(cache_dir, fs)
    return fs.operations


@pytest.mark.promise("committed survives")
def test_commit_syncs_the_file_then_names_it_then_syncs_the_directory(tmp_path: Path) -> None:
    operations = clean_operations(tmp_path)
    steps = [
        name
        for name in operations
        if name in ("pwrite", "fsync", "close", "link", "unlink", "fsync_directory")
    ]
    assert steps == [
        "pwrite",
        "pwrite",
        "pwrite",
        "fsync",
        "close",
        "link",
        "unlink",
        "fsync_directory",
        "close",
    ]


@pytest.mark.parametrize("refuse", [False, True], ids=["taken", "refused"])
def test_the_disk_is_asked_to_begin_while_records_are_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: bool
) -> None:
    """In order and without gaps, never past what is written; and a hint that is refused changes nothing."""
    begun: list[tuple[int, int]] = []
    features = [make_feature(number) for number in range(5)]
    size = features[0].nbytes
    monkeypatch.setattr("vggt_cache.store.atomic_file.WRITE_BACK_BYTES", 2 * size)

    class Hinted(FileSystem):
        def begin_write_back(self, fd: int, offset: int, length: int) -> None:
            assert offset + length == os.fstat(fd).st_size
            begun.append((offset, offset + length))
            if refuse:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with ShardWriter(create_store(tmp_path, SPEC), SPEC, fs=Hinted()) as writer:
        for number, feature in enumerate(features):
            writer.append(make_key(number), feature)
        writer.commit()
    assert [start for start, _ in begun] == [0, *(end for _, end in begun[:-1])]
    assert begun[-1][1] >= writer.bytes_written - 2 * size
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, list(range(5)))


@pytest.mark.promise("Never torn")
def test_nothing_can_be_seen_before_commit_returns(tmp_path: Path) -> None:
    def fault(name: str, position: int, call: Call) -> Any:
        if name in ("pwrite", "fsync"):
            with FeatureCache.open(tmp_path) as cache:
                assert len(cache) == 0
        return call()

    commit_two(tmp_path, TracedFileSystem(fault))
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 2])


@pytest.mark.promise("a failure commits nothing")
@pytest.mark.parametrize(
    ("error", "links"),
    [
        pytest.param(errno.EIO, True, id="EIO, links"),
        pytest.param(errno.ENOSPC, False, id="ENOSPC, no links"),
        pytest.param(errno.EDQUOT, True, id="EDQUOT, links", marks=pytest.mark.slow),
        pytest.param(errno.ESTALE, False, id="ESTALE, no links", marks=pytest.mark.slow),
    ],
)
def test_a_failure_at_any_operation_commits_nothing_and_leaves_nothing(
    tmp_path: Path, error: int, links: bool
) -> None:
    """Where the failed operation is harmless (a lock, dropping the temporary name) the commit may succeed.

    When syncing the directory fails the shard has its name already, and others may rely on it, so it stays.
    """
    create_store(tmp_path, SPEC)
    count = len(clean_operations(tmp_path / "clean")) + (0 if links else 3)
    for failed_at in range(count):

        def fault(name: str, position: int, call: Call, failed_at: int = failed_at) -> Any:
            if position == failed_at and name != "clock_s":
                if name == "close":
                    call()  # on Linux a descriptor is gone even when closing it reports an error
                raise OSError(error, os.strerror(error))
            if name == "link" and not links:
                raise OSError(errno.EPERM, "no links here")
            return call()

        fs, committed = TracedFileSystem(fault), True
        with no_descriptor_leaks():
            try:
                commit_two(tmp_path, fs)
            except CommitError:
                committed = False
        failed_operation = fs.operations[failed_at] if failed_at < len(fs.operations) else "none"
        visible = (
            committed or failed_operation == "fsync_directory"
        )  # a name that was given is not taken back
        with FeatureCache.open(tmp_path) as cache:
            assert holds(cache, [1, 2] if visible else []), failed_operation
        if committed:
            assert failed_operation in ("try_lock", "unlink", "stat", "close", "clock_s", "none")
        if failed_operation != "unlink":
            assert temp_files(tmp_path) == []
        for path in shards_dir(tmp_path).iterdir():
            path.unlink()


@pytest.mark.promise("a failure commits nothing")
def test_a_failed_fsync_is_not_repeated(tmp_path: Path) -> None:
    fs = failing("fsync", errno.EIO)
    with pytest.raises(CommitError):
        commit_two(tmp_path, fs)
    assert fs.operations.count("fsync") == 1
    fs = failing("fsync_directory", errno.EIO)
    with pytest.raises(CommitError):
        commit_two(tmp_path, fs)
    assert fs.operations.count("fsync_directory") == 1


@pytest.mark.promise("a failure commits nothing")
def test_a_failure_to_close_the_file_is_a_failure_to_commit(tmp_path: Path) -> None:
    """Network file systems report here what they could not write."""
    with pytest.raises(CommitError, match="quota"):
        commit_two(tmp_path, failing("close", errno.EDQUOT, done=True))
    assert os.listdir(shards_dir(tmp_path)) == []


def test_the_bytes_are_synced_after_the_last_write_and_before_the_name_exists(tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []

    def fault(name: str, position: int, call: Call) -> Any:
        events.append((name, len([n for n in os.listdir(shards_dir(tmp_path)) if not n.startswith(".")])))
        return call()

    commit_two(tmp_path, TracedFileSystem(fault))
    names = [name for name, _ in events]
    assert (
        max(i for i, name in enumerate(names) if name == "pwrite")
        < names.index("fsync")
        < names.index("link")
    )
    assert dict(events)["fsync"] == 0
    assert dict(events)["fsync_directory"] == 1


@pytest.mark.parametrize("operation", ["link", "rename"])
def test_publishing_that_is_reported_as_failed_but_was_done_counts_as_done(
    tmp_path: Path, operation: str
) -> None:
    def fault(name: str, position: int, call: Call) -> Any:
        if name == operation:
            call()
            raise OSError(errno.EIO, "lost the answer")
        if name == "link":
            raise OSError(errno.EPERM, "no links here")
        return call()

    name = commit_two(tmp_path, TracedFileSystem(fault))
    assert os.listdir(shards_dir(tmp_path)) == [name]
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 2])


@pytest.mark.promise("shards never change")
@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_name_that_is_taken_is_never_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    taken = write_shard(tmp_path, [7])
    before = shard_path(tmp_path, taken).read_bytes()
    monkeypatch.setattr("vggt_cache.store.writer.next_shard_name", lambda names, now_s: taken)
    fs = FileSystem() if links else TracedFileSystem(_without_links)
    with pytest.raises(CommitError):
        commit_two(tmp_path, fs)
    assert shard_path(tmp_path, taken).read_bytes() == before
    assert temp_files(tmp_path) == []


def _without_links(name: str, position: int, call: Call) -> Any:
    if name == "link":
        raise OSError(errno.EPERM, "no links here")
    return call()


class Stingy(FileSystem):
    """Takes and gives a few bytes at a time."""

    calls = 0

    def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
        self.calls += 1
        return super().pwrite(fd, memoryview(data)[:701], offset)

    def preadv(self, fd: int, buffers: Any, offset: int) -> int:
        self.calls += 1
        return super().preadv(fd, [buffers[0][:701]], offset)


@pytest.mark.promise("exact or an error")
def test_short_writes_and_short_reads_change_nothing(tmp_path: Path) -> None:
    spec, fs = make_spec(embed_dim=300), Stingy()
    for number in range(3):
        write_shard(tmp_path, [number], spec, fs=fs)
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        assert holds(cache, range(3))
        assert cache.save_index()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        assert cache.unindexed_shards == ()
        assert holds(cache, range(3))
    assert fs.calls > 30


def test_calls_about_names_that_a_signal_interrupts_are_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they were done by then or not. Python repeats all others by itself."""
    interrupted: list[str] = []
    for name in ("stat", "listdir", "mkdir", "link", "rename", "unlink"):
        real = getattr(os, name)

        def call(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            interrupted.append(name)
            if interrupted.count(name) % 3 == 1:
                raise InterruptedError(errno.EINTR, "signal")
            result = real(*args, **options)
            if interrupted.count(name) % 3 == 2 and name != "stat":
                raise InterruptedError(errno.EINTR, "signal")
            return result

        monkeypatch.setattr(os, name, call)
    for number in range(3):
        write_shard(tmp_path, [number])
    save_index(tmp_path)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(3))
    assert {"listdir", "mkdir", "link", "rename", "unlink"} <= set(interrupted)


def test_a_system_that_accepts_no_bytes_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    class Full(FileSystem):
        def pwrite(self, fd: int, data: Buffer, offset: int) -> int:
            return 0

    with pytest.raises(CommitError, match="could not be written to the disk"):
        commit_two(tmp_path, Full())


@pytest.mark.parametrize(
    ("error", "words"),
    [(errno.ENOSPC, "the disk is full: free some space"), (errno.EDQUOT, "quota is used up")],
)
def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path, error: int, words: str) -> None:
    with pytest.raises(CommitError, match=words) as caught:
        commit_two(tmp_path, failing("pwrite", error, nth=1))
    assert "not committed" in str(caught.value)


@pytest.mark.promise("a failure commits nothing")
def test_a_disk_that_is_really_full_loses_nothing_that_was_committed(small_disk: Path) -> None:
    assert os.statvfs(small_disk).f_blocks * os.statvfs(small_disk).f_frsize <= 1 << 20
    spec = make_spec(embed_dim=4096)
    committed: list[int] = []

    def fill() -> None:
        for number in range(100):
            write_shard(small_disk, [number], spec, max_records=4)
            committed.append(number)

    with pytest.raises(CommitError, match="the disk is full"):
        fill()
    assert 0 < len(committed) < 30
    assert temp_files(small_disk) == []
    with FeatureCache.open(small_disk) as cache:
        assert holds(cache, committed)


@pytest.mark.promise("shards never change", "modes of the umask")
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002, 0o077])
def test_files_have_the_modes_of_the_umask_and_shards_are_read_only(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        name = write_shard(tmp_path / "cache", [1])
        index = save_index(tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE(shard_path(tmp_path / "cache", name).stat().st_mode) == 0o444 & ~umask
    assert stat.S_IMODE(index.stat().st_mode) == 0o666 & ~umask
    assert stat.S_IMODE((index.parent.parent / "spec.json").stat().st_mode) == 0o666 & ~umask
    for folder in (index.parent, shards_dir(tmp_path / "cache"), index.parent.parent, tmp_path / "cache"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_a_file_system_without_modes_is_good_enough(tmp_path: Path) -> None:
    commit_two(tmp_path, failing("set_mode", errno.EPERM))
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 2])


# ---------------------------------------------------------------- the writer


def test_leaving_the_writer_without_commit_leaves_nothing(tmp_path: Path) -> None:
    store_dir = create_store(tmp_path, SPEC)
    with no_descriptor_leaks():
        with ShardWriter(store_dir, SPEC) as writer:
            writer.append(make_key(1), make_feature(1))
            assert len(temp_files(tmp_path)) == 1
        with suppress(KeyboardInterrupt), ShardWriter(store_dir, SPEC) as writer:
            writer.append(make_key(1), make_feature(1))
            raise KeyboardInterrupt
        writer.abort()
    assert os.listdir(shards_dir(tmp_path)) == []


def test_a_record_is_on_its_way_to_the_disk_when_append_returns(tmp_path: Path) -> None:
    spec = make_spec(embed_dim=1000)
    with ShardWriter(create_store(tmp_path, spec), spec) as writer:
        writer.append(make_key(1), make_feature(1, spec))
        assert temp_files(tmp_path)[0].stat().st_size >= make_feature(1, spec).nbytes
        assert writer.bytes_written == make_feature(1, spec).nbytes
        assert writer.record_count == 1


def test_the_writer_refuses_what_is_no_feature_of_its_store(tmp_path: Path) -> None:
    store_dir = create_store(tmp_path, SPEC)
    with ShardWriter(store_dir, SPEC, max_records=2) as writer:
        for wrong in (
            torch.zeros(2, 3, 4),
            torch.zeros(2, 3, 5, dtype=torch.bfloat16),
            torch.zeros(6, 4, dtype=torch.bfloat16),
            torch.zeros(0, 3, 4, dtype=torch.bfloat16),
        ):
            with pytest.raises(SettingsError):
                writer.append(make_key(1), wrong)
        with pytest.raises(SettingsError, match="16 bytes"):
            writer.append(b"short", make_feature(1))
        writer.append(make_key(1), make_feature(1))
        with pytest.raises(SettingsError, match="already"):
            writer.append(make_key(1), make_feature(1))
        assert not writer.is_full
        writer.append(make_key(2), make_feature(2))
        assert writer.is_full
        with pytest.raises(SettingsError, match="commit"):
            writer.append(make_key(3), make_feature(3))
        writer.commit()
        with pytest.raises(SettingsError, match="new ShardWriter"):
            writer.append(make_key(3), make_feature(3))
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 2])


def test_a_feature_that_is_not_contiguous_is_stored_as_it_looks(tmp_path: Path) -> None:
    wide = torch.randn(3, 2, 4).bfloat16().transpose(0, 1)
    assert not wide.is_contiguous()
    write_shard(tmp_path, {5: wide})
    with FeatureCache.open(tmp_path) as cache:
        assert torch.equal(cache.get_by_key(make_key(5)), wide)


@pytest.mark.promise("shards never change")
def test_writers_at_once_have_files_of_their_own_though_their_processes_have_one_number(
    tmp_path: Path,
) -> None:
    """As on two machines, or in two containers, that share a directory; here it is one process."""
    store_dir = create_store(tmp_path, SPEC)
    with ShardWriter(store_dir, SPEC) as one, ShardWriter(store_dir, SPEC) as other:
        for number, writer in ((1, one), (2, other)):
            writer.append(make_key(number), make_feature(number))
        assert len(temp_files(tmp_path)) == 2
        one.commit()
        other.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1, 2])


def test_an_empty_shard_is_not_committed(tmp_path: Path) -> None:
    with (
        ShardWriter(create_store(tmp_path, SPEC), SPEC) as writer,
        pytest.raises(SettingsError, match="no records"),
    ):
        writer.commit()
    assert os.listdir(shards_dir(tmp_path)) == []


def test_a_store_of_another_specification_is_not_written_to(tmp_path: Path) -> None:
    store_dir = create_store(tmp_path, SPEC)
    with pytest.raises(SpecMismatchError, match="create_store"):
        ShardWriter(store_dir, make_spec(context="causal"))


def test_a_writer_without_a_store_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CommitError, match="shards"):
        ShardWriter(tmp_path / SPEC.short_name, SPEC)


def test_a_forked_copy_of_a_writer_does_not_take_the_file_away(tmp_path: Path) -> None:
    with ShardWriter(create_store(tmp_path, SPEC), SPEC) as writer:
        writer.append(make_key(1), make_feature(1))
        child = os.fork()
        if child == 0:
            writer.abort()
            os._exit(0)
        os.waitpid(child, 0)
        writer.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


def test_a_later_commit_has_a_later_name_even_if_the_clock_went_back(tmp_path: Path) -> None:
    class Past(FileSystem):
        def clock_s(self) -> float:
            return 1.0

    first = write_shard(tmp_path, [1])
    second = write_shard(tmp_path, [2], fs=Past())
    third = write_shard(tmp_path, [3])
    assert first < second < third
    assert next_shard_name(["ffffffffffff-0000000000000000.safetensors"], 5.0).startswith("ffffffffffff-")
    assert next_shard_name(["not a shard", ".tmp-0123456789abcdef"], 0.001).startswith("000000000001-")

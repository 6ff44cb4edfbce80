"""The index may be missing, old, foreign or damaged: the answers stay the same."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from store_kit import (
    SPEC,
    TracedFileSystem,
    failing,
    holds,
    make_key,
    make_spec,
    no_descriptor_leaks,
    save_index,
    shard_path,
    shards_dir,
    temp_files,
    write_shard,
)
from vggt_cache.store import FeatureCache
from vggt_cache.store import derive as derive_module
from vggt_cache.store.index import Index, IndexDamagedError, MemorySource, build_index
from vggt_cache.store.rows import ROW_DTYPE, Rows, unpack_rows

NAMES = [f"{n:012x}-{n:016x}.safetensors" for n in range(7)]


def make_rows(count: int, *, shards: int = 7, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    rows = np.zeros(count, ROW_DTYPE)
    rows["high"], rows["low"] = generator.integers(0, 2**63, (2, count)) * 2 + 1
    rows["checksum"] = np.frombuffer(generator.bytes(16 * count), "V16")
    rows["offset"], rows["h"], rows["w"] = np.arange(count) * 4096, 2, 3
    rows["shard"] = np.arange(count) % shards
    return rows


def make_index(rows: Rows, names: list[str] = NAMES) -> Index:
    return Index(MemorySource(b"".join(build_index(rows, names, SPEC.fingerprint))), SPEC.fingerprint)


def without_headers(cache_dir: Path) -> FeatureCache:
    """The cache, opened with a file system that fails if a shard's header is read before a record is asked for."""
    fs = TracedFileSystem()
    cache = FeatureCache.open(cache_dir, fs=fs)
    # spec.json and the index are the only files that are opened
    assert fs.operations.count("open_file") == 2
    return cache


# ---------------------------------------------------------------- the table itself


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 64, 1000, 20_000])
def test_every_key_is_found_where_it_is_and_no_other_is(count: int) -> None:
    rows = make_rows(count)
    index = make_index(rows)
    assert (index.row_count, index.key_count, index.shard_count) == (count, count, 7)
    sample = random.Random(1).sample(range(count), min(count, 500))
    wanted = list(unpack_rows(rows[sample]))
    assert all(index.find(record.key) == [(shard, record)] for shard, record in wanted)
    assert not any(index.find(random.randbytes(16)) for _ in range(200))
    assert [key for key, _ in index.keys_after()] == sorted(record.key for _, record in unpack_rows(rows))
    assert index.check_all()
    assert np.array_equal(np.sort(index.rows()), np.sort(rows))


def test_a_key_is_not_found_inside_of_other_bytes_of_a_row() -> None:
    rows = make_rows(40)
    rows["checksum"][7] = np.frombuffer(b"0123456789abcdef", "V16")[0]
    index = make_index(rows)
    bucket_mate = next(unpack_rows(rows[7:8]))[1].key[:8]
    assert index.find(b"0123456789abcdef") == []
    rows["checksum"][7] = np.frombuffer(bucket_mate + b"tailtail", "V16")[0]
    assert make_index(rows).find(bucket_mate + b"tailtail") == []


def test_of_equal_keys_the_one_in_the_latest_shard_comes_first() -> None:
    rows = make_rows(500)
    for field in ("high", "low"):
        rows[field][100:107] = rows[field][0]
    rows["shard"][100:107] = [3, 0, 6, 1, 5, 2, 4]
    rows["shard"][0] = 0
    index = make_index(rows)
    key = next(unpack_rows(rows[:1]))[1].key
    assert [shard for shard, _ in index.find(key)][:6] == [6, 5, 4, 3, 2, 1]
    assert index.key_count == 500 - 7


def test_an_index_of_another_store_is_not_opened() -> None:
    data = b"".join(build_index(make_rows(3), NAMES, SPEC.fingerprint))
    with pytest.raises(IndexDamagedError, match="another store"):
        Index(MemorySource(data), "0" * 64)


def test_iteration_can_be_taken_up_behind_any_key() -> None:
    index = make_index(make_rows(300))
    keys = [key for key, _ in index.keys_after()]
    for position in range(0, 300, 37):
        assert [key for key, _ in index.keys_after(keys[position])] == keys[position + 1 :]


@pytest.mark.parametrize("count", [0, 3, 200])
def test_no_flipped_bit_and_no_cut_in_an_index_gives_a_wrong_answer(count: int) -> None:
    rows = make_rows(count)
    data = b"".join(build_index(rows, NAMES, SPEC.fingerprint))
    wanted = {record.key: [(shard, record)] for shard, record in unpack_rows(rows)}
    absent = [random.Random(n).randbytes(16) for n in range(5)]
    chooser = random.Random(count)

    def check(changed: bytes) -> int:
        try:
            index = Index(MemorySource(changed), SPEC.fingerprint)
        except IndexDamagedError:
            return 1
        detected = 0
        for key in [*wanted, *absent]:
            try:
                assert index.find(key) == wanted.get(key, [])
            except IndexDamagedError:
                detected += 1
        return detected

    positions = range(len(data)) if count < 200 else sorted(chooser.sample(range(len(data)), 400))
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 1 << chooser.randrange(8)
        assert check(bytes(changed)) > 0
    for length in positions:
        assert check(data[:length]) > 0
    assert check(data + b"x") > 0
    assert check(data) == 0


def test_an_index_with_sound_checksums_that_names_no_shard_of_its_own_is_damaged() -> None:
    rows = make_rows(100)
    rows["shard"][50] = 7
    index = make_index(rows)
    key = next(unpack_rows(rows[50:51]))[1].key
    for question in (lambda: index.find(key), lambda: list(index.keys_after()), lambda: index.rows()):
        with pytest.raises(IndexDamagedError):
            question()


# ---------------------------------------------------------------- in a store


def fill(cache_dir: Path) -> None:
    for first in range(0, 40, 10):
        write_shard(cache_dir, range(first, first + 10))


def delete(rows: Path) -> None:
    shutil.rmtree(rows.parent)


def truncate(rows: Path) -> None:
    os.truncate(rows, rows.stat().st_size // 2)


def empty(rows: Path) -> None:
    os.truncate(rows, 0)


def flip_in_head(rows: Path) -> None:
    _flip(rows, 30)


def flip_in_rows(rows: Path) -> None:
    for position in range(rows.stat().st_size - 40 * 56, rows.stat().st_size, 56):
        _flip(rows, position + 3)


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def make_fifo(rows: Path) -> None:
    rows.unlink()
    os.mkfifo(rows)


def make_directory(rows: Path) -> None:
    rows.unlink()
    rows.mkdir()


def make_link(rows: Path) -> None:
    rows.rename(rows.parent / "elsewhere")
    rows.symlink_to(rows.parent / "elsewhere")


@pytest.mark.parametrize(
    "spoil",
    [delete, truncate, empty, flip_in_head, flip_in_rows, make_fifo, make_directory, make_link],
    ids=lambda spoil: spoil.__name__,
)
def test_a_lost_or_damaged_index_changes_no_answer(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    fill(tmp_path)
    rows = save_index(tmp_path)
    with without_headers(tmp_path) as cache:
        assert holds(cache, range(40))
        snapshot = cache.snapshot
    spoil(rows)
    with no_descriptor_leaks(), FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(40))
        assert make_key(40) not in cache
        assert cache.snapshot == snapshot


def test_an_index_that_is_damaged_under_an_open_cache_changes_no_answer(tmp_path: Path) -> None:
    fill(tmp_path)
    rows = save_index(tmp_path)
    undamaged = rows.read_bytes()
    with FeatureCache.open(tmp_path) as cache:
        keys = cache.keys()
        seen = [next(keys) for _ in range(5)]
        flip_in_rows(rows)
        assert seen + list(keys) == sorted(make_key(n) for n in range(40))
        assert holds(cache, range(40))
        cache.refresh()
        assert holds(cache, range(40))
        assert cache.save_index()
    assert rows.read_bytes() == undamaged


def test_an_index_that_was_replaced_on_another_machine_is_opened_again(tmp_path: Path) -> None:
    """A network file system then answers ESTALE. No header is read for that, and the next refresh uses the index."""
    stale: set[int] = set()

    class ForgetsReplacedFiles(TracedFileSystem):
        def pread(self, fd: int, length: int, offset: int) -> bytes:
            if os.fstat(fd).st_ino in stale:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return super().pread(fd, length, offset)

    for number in (1, 2):
        write_shard(tmp_path, [number])
    index = save_index(tmp_path)
    fs = ForgetsReplacedFiles()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        for number in (3, 4):
            stale.add(index.stat().st_ino)
            with open(index, "rb"):  # or the new file might get the old one's number
                write_shard(tmp_path, [number])
                save_index(tmp_path)
            opened = fs.operations.count("open_file")
            assert make_key(1) in cache
            assert make_key(number) not in cache
            assert fs.operations.count("open_file") == opened + 1
            cache.refresh()
            assert holds(cache, [1, 2, 3, 4][:number])


def test_an_index_from_another_store_is_ignored(tmp_path: Path) -> None:
    other = make_spec(context="causal")
    write_shard(tmp_path, range(5))
    write_shard(tmp_path, range(3, 9), other)
    foreign = save_index(tmp_path, other)
    mine = save_index(tmp_path)
    shutil.copy(foreign, mine)
    with FeatureCache.open(tmp_path, spec=SPEC) as cache:
        assert holds(cache, range(5))


def test_an_index_from_another_directory_of_the_same_specification_is_ignored(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", range(5))
    write_shard(tmp_path / "b", range(3, 9))
    shutil.copy(save_index(tmp_path / "b"), save_index(tmp_path / "a"))
    with FeatureCache.open(tmp_path / "a") as cache:
        assert holds(cache, range(5))
        assert cache.get_by_key(make_key(8)) is None


def test_an_index_whose_rows_are_wrong_though_its_checksums_fit_is_found_out(tmp_path: Path) -> None:
    """As if an earlier version of this program had made a mistake: offsets, checksums, whole keys."""
    fill(tmp_path)
    rows_file = save_index(tmp_path)
    with FeatureCache.open(tmp_path) as cache:
        names = list(cache.shard_names())
        good = cache._view.snapshot.rows_in(names)
    wrong = good.copy()
    wrong["offset"] += 48
    swapped = good.copy()
    swapped["checksum"] = np.roll(good["checksum"], 1)
    elsewhere = good.copy()
    elsewhere["shard"] = (good["shard"] + 1) % 4
    reshaped = good.copy()
    reshaped["h"], reshaped["w"] = 3, 2
    for rows in (wrong, swapped, elsewhere, reshaped):
        rows_file.write_bytes(b"".join(build_index(rows, names, SPEC.fingerprint)))
        with FeatureCache.open(tmp_path) as cache:
            assert holds(cache, range(40))


def test_shards_that_the_index_does_not_cover_are_read_from_their_headers(tmp_path: Path) -> None:
    write_shard(tmp_path, range(10))
    save_index(tmp_path)
    write_shard(tmp_path, range(8, 20))
    with FeatureCache.open(tmp_path) as cache:
        assert cache._view.snapshot.base is not None
        assert holds(cache, range(20))
        assert cache.shard_of(make_key(9)) == cache.shard_names()[1]
        assert cache.shard_of(make_key(7)) == cache.shard_names()[0]


def test_a_shard_that_the_index_covers_and_that_is_gone_takes_its_features_with_it(tmp_path: Path) -> None:
    write_shard(tmp_path, range(10))
    gone = write_shard(tmp_path, range(5, 20))
    write_shard(tmp_path, range(18, 25))
    save_index(tmp_path)
    shard_path(tmp_path, gone).unlink()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [*range(10), *range(18, 25)])
        assert cache.save_index()
    with without_headers(tmp_path) as cache:
        assert holds(cache, [*range(10), *range(18, 25)])
        assert cache._view.snapshot.base is not None
        assert gone not in cache._view.snapshot.base.index.names()


def test_a_rebuilt_index_is_the_same_bytes(tmp_path: Path) -> None:
    """Whether it grew shard by shard on top of older ones, or was made at once from the shards."""
    for first in range(0, 40, 10):
        write_shard(tmp_path, range(first, first + 15))
        rows = save_index(tmp_path)
    grown = rows.read_bytes()
    rows.unlink()
    assert save_index(tmp_path).read_bytes() == grown


def test_an_older_process_does_not_replace_a_newer_index(tmp_path: Path) -> None:
    write_shard(tmp_path, range(10))
    with FeatureCache.open(tmp_path) as old:
        write_shard(tmp_path, range(10, 20))
        newer = save_index(tmp_path).read_bytes()
        assert old.save_index()
        assert holds(old, range(10))
    assert (tmp_path / SPEC.short_name / "index" / "rows").read_bytes() == newer


@pytest.mark.parametrize(
    "operation", ["make_directory", "create_file", "pwrite", "fsync", "rename", "fsync_directory"]
)
def test_an_index_that_cannot_be_saved_costs_a_warning_and_nothing_else(
    tmp_path: Path, operation: str
) -> None:
    fill(tmp_path)
    with FeatureCache.open(tmp_path, fs=failing(operation, errno.ENOSPC)) as cache:
        with pytest.warns(UserWarning, match="nothing is lost"):
            assert cache.save_index() is False
        assert holds(cache, range(40))
    assert temp_files(tmp_path) == []
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(40))


def test_saving_an_index_syncs_the_names_of_the_shards_that_it_lists(tmp_path: Path) -> None:
    """Else a power failure could take a shard away that a run counted as done because the index has it."""
    fill(tmp_path)
    fs = TracedFileSystem()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        cache.save_index()
    steps = [name for name in fs.operations if name in ("fsync_directory", "pwrite", "fsync", "rename")]
    assert steps == ["fsync_directory", "pwrite", "pwrite", "fsync", "rename", "fsync_directory"]


def test_without_an_index_memory_is_not_spent_on_a_large_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path)
    monkeypatch.setattr(derive_module, "MAX_IN_MEMORY_BYTES", 100)
    with no_descriptor_leaks(), FeatureCache.open(tmp_path) as cache:
        supplement = cache._view.snapshot.supplement
        assert supplement is not None
        assert not isinstance(supplement.index._source, MemorySource)
        assert holds(cache, range(40))
        write_shard(tmp_path, range(40, 45))
        cache.refresh()
        assert holds(cache, range(45))
        del supplement
    monkeypatch.setattr(os, "dup", _no_room)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, range(45))


def _no_room(fd: int) -> int:
    raise OSError(errno.ENOSPC, "no room for a temporary file")


def test_a_listing_that_lags_behind_hides_nothing_that_is_known(tmp_path: Path) -> None:
    """On a network file system a directory listing may lack names for a while."""
    fill(tmp_path)
    save_index(tmp_path)
    complete = TracedFileSystem()
    newest = sorted(os.listdir(shards_dir(tmp_path)))[1]
    store_names = [SPEC.short_name]

    def fault(name: str, position: int, call: Callable[[], object]) -> object:
        result = call()
        if name == "list_names" and result != store_names:
            return [n for n in result if n > newest]  # type: ignore[attr-defined]
        return result

    with FeatureCache.open(tmp_path, fs=TracedFileSystem(fault)) as cache:
        assert holds(cache, range(40))
    with FeatureCache.open(tmp_path, fs=complete) as cache:
        before = cache.snapshot
        complete._fault = fault
        write_shard(tmp_path, range(40, 42))
        cache.refresh()
        assert holds(cache, range(42))
        assert cache.snapshot != before

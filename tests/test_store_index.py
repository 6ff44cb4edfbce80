"""The index may be missing, old, foreign or damaged: the answers stay the same."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tracemalloc
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
from vggt_cache.store import FeatureCache, FileSystem
from vggt_cache.store.index import IndexFile, index_bytes
from vggt_cache.store.record import (
    ROW_DTYPE,
    RecordTable,
    Rows,
    join_rows,
    key_array,
    sort_rows,
    unpack_rows,
)

NAMES = [f"{n:012x}-{n:016x}.safetensors" for n in range(7)]


def make_rows(count: int, *, shards: int = 7, seed: int = 0) -> Rows:
    generator = np.random.default_rng(seed)
    rows = np.zeros(count, ROW_DTYPE)
    rows["high"], rows["low"] = generator.integers(0, 2**63, (2, count)) * 2 + 1
    rows["checksum"] = np.frombuffer(generator.bytes(16 * count), "V16")
    rows["offset"], rows["h"], rows["w"] = np.arange(count) * 4096, 2, 3
    rows["shard"] = np.arange(count) % shards
    return rows


def make_table(rows: Rows, names: list[str] = NAMES) -> RecordTable:
    return RecordTable(names, sort_rows(rows))


def make_index(table: RecordTable) -> bytes:
    return b"".join(index_bytes(table, SPEC.fingerprint))


class Saved:
    """A place for an index of any bytes."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "index" / "rows"
        self.path.parent.mkdir()
        self.file = IndexFile(str(folder), SPEC.fingerprint, FileSystem())

    def load(self, data: bytes) -> RecordTable | None:
        self.path.write_bytes(data)
        return self.file.load()


def index_of(cache_dir: Path) -> RecordTable:
    table = IndexFile(str(cache_dir / SPEC.short_name), SPEC.fingerprint, FileSystem()).load()
    assert table is not None
    return table


def without_headers(cache_dir: Path) -> FeatureCache:
    """The cache, opened with a file system that fails if a shard's header is read before a record is asked for."""
    fs = TracedFileSystem()
    cache = FeatureCache.open(cache_dir, fs=fs)
    # spec.json and the index are the only files that are opened
    assert fs.operations.count("open_file") == 2
    return cache


# ---------------------------------------------------------------- the table itself


@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 64, 1000, 20_000])
def test_every_key_is_found_where_it_is_and_no_other_is(count: int, tmp_path: Path) -> None:
    rows = make_rows(count)
    table = Saved(tmp_path).load(make_index(make_table(rows)))
    assert table is not None
    assert (len(table.rows), table.key_count, table.shards) == (count, count, tuple(NAMES))
    sample = random.Random(1).sample(range(count), min(count, 500))
    wanted = list(unpack_rows(rows[sample]))
    assert all(table.find(record.key) == [(NAMES[shard], record)] for shard, record in wanted)
    assert not any(table.find(random.randbytes(16)) for _ in range(200))
    assert list(table.keys()) == sorted(record.key for _, record in unpack_rows(rows))
    assert np.array_equal(np.sort(table.rows), np.sort(rows))


@pytest.mark.parametrize("high", [0, 1, 2**64 - 1])
def test_keys_that_begin_alike_are_found_too(high: int) -> None:
    """All in one bucket, at either end of the table."""
    rows = make_rows(300)
    rows["high"][:200] = high
    table = make_table(rows)
    assert all(table.find(record.key) == [(NAMES[shard], record)] for shard, record in unpack_rows(rows))
    assert list(table.keys()) == sorted(record.key for _, record in unpack_rows(rows))


@pytest.mark.parametrize("count", [0, 1, 500])
def test_many_keys_are_found_at_once_where_each_is_found_alone(count: int) -> None:
    """Also keys that begin alike, be they there or not, and several copies of one."""
    rows = make_rows(count)
    rows["high"][: count // 2] //= 2**60
    rows["low"][: count // 2] %= 3
    table = make_table(rows)
    keys = [*table.keys(), *(make_key(-number) for number in range(50))]
    keys += [bytes([*key[:15], key[15] ^ 1]) for key in keys[:200]]
    random.Random(0).shuffle(keys)
    found = table.find_shards(key_array(keys)).tolist()
    for key, shard in zip(keys, found, strict=True):
        alone = table.find(key)
        assert shard == (NAMES.index(alone[0][0]) if alone else -1)


def test_tables_join_with_each_shard_taken_from_the_first_that_has_it() -> None:
    rows = make_rows(700)
    whole = make_table(rows)
    parts = []
    for names in (NAMES[4:6], NAMES[:5], NAMES):
        mine = rows[np.isin(rows["shard"], [NAMES.index(name) for name in names])].copy()
        mine["shard"] -= NAMES.index(names[0])
        parts.append((names, mine))
    joined = RecordTable.merged(NAMES, parts)
    assert joined.shards == whole.shards
    assert np.array_equal(joined.rows, whole.rows)
    without = RecordTable.merged(NAMES[1:], parts)
    assert without.shards == tuple(NAMES[1:])
    assert list(without.keys()) == [r.key for s, r in unpack_rows(whole.rows) if s != 0]


def test_a_key_is_not_found_inside_of_other_bytes_of_a_row() -> None:
    rows = make_rows(40)
    rows["checksum"][7] = np.frombuffer(b"0123456789abcdef", "V16")[0]
    table = make_table(rows)
    bucket_mate = next(unpack_rows(rows[7:8]))[1].key[:8]
    assert table.find(b"0123456789abcdef") == []
    rows["checksum"][7] = np.frombuffer(bucket_mate + b"tailtail", "V16")[0]
    assert make_table(rows).find(bucket_mate + b"tailtail") == []


@pytest.mark.promise("shards never change")
def test_of_equal_keys_the_one_in_the_latest_shard_comes_first() -> None:
    rows = make_rows(500)
    for field in ("high", "low"):
        rows[field][100:107] = rows[field][0]
    rows["shard"][100:107] = [3, 0, 6, 1, 5, 2, 4]
    rows["shard"][0] = 0
    table = make_table(rows)
    key = next(unpack_rows(rows[:1]))[1].key
    assert [shard for shard, _ in table.find(key)][:6] == [NAMES[n] for n in (6, 5, 4, 3, 2, 1)]
    assert table.key_count == 500 - 7
    assert len(list(table.keys())) == 500 - 7


def test_an_index_of_another_store_is_not_opened(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    assert saved.load(make_index(make_table(make_rows(3)))) is not None
    assert saved.load(b"".join(index_bytes(make_table(make_rows(3)), "0" * 64))) is None


@pytest.mark.promise("any index, any place")
@pytest.mark.parametrize("count", [0, 3, 200])
def test_no_flipped_bit_and_no_cut_in_an_index_gives_a_wrong_answer(count: int, tmp_path: Path) -> None:
    """A damaged one is not opened."""
    saved, chooser = Saved(tmp_path), random.Random(count)
    data = make_index(make_table(make_rows(count)))
    positions = range(len(data)) if count < 200 else sorted(chooser.sample(range(len(data)), 400))
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 1 << chooser.randrange(8)
        assert saved.load(bytes(changed)) is None
    for length in positions:
        assert saved.load(data[:length]) is None
    assert saved.load(data + b"x") is None
    assert saved.load(data) is not None


def test_an_index_with_a_sound_checksum_that_names_no_shard_of_its_own_is_damaged(tmp_path: Path) -> None:
    rows = make_rows(100)
    rows["shard"][50] = 7
    saved = Saved(tmp_path)
    assert saved.load(make_index(make_table(rows))) is None
    rows["shard"][50] = 6
    assert saved.load(make_index(make_table(rows))) is not None
    for names in (NAMES[::-1], [NAMES[0]] * 7, [*NAMES[:6], "x" * 41]):
        assert saved.load(make_index(make_table(rows, names))) is None


def test_an_index_that_claims_to_be_huge_costs_no_memory(tmp_path: Path) -> None:
    saved = Saved(tmp_path)
    saved.load(make_index(make_table(make_rows(3))))
    with open(saved.path, "r+b") as file:
        file.seek(16)
        file.write((2**50).to_bytes(8, "little"))
        file.truncate(2**40)
    assert saved.file.load() is None


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


@pytest.mark.promise("any index, any place")
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


def test_an_index_is_read_when_a_cache_is_opened_and_never_again(tmp_path: Path) -> None:
    """So it may be replaced, cut or removed under an open cache, here or on another machine."""
    fill(tmp_path)
    rows = save_index(tmp_path)
    fs = TracedFileSystem()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        delete(rows)
        before = len(fs.operations)
        assert len(cache) == len(list(cache)) == 40
        assert all(make_key(number) in cache for number in range(40))
        assert len(fs.operations) == before
        assert holds(cache, range(40))


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
    good = index_of(tmp_path).rows
    wrong = good.copy()
    wrong["offset"] += 48
    swapped = good.copy()
    swapped["checksum"] = np.roll(good["checksum"], 1)
    elsewhere = good.copy()
    elsewhere["shard"] = (good["shard"] + 1) % 4
    reshaped = good.copy()
    reshaped["h"], reshaped["w"] = 3, 2
    for rows in (wrong, swapped, elsewhere, reshaped):
        rows_file.write_bytes(make_index(make_table(rows, names)))
        with FeatureCache.open(tmp_path) as cache:
            assert holds(cache, range(40))


def test_shards_that_the_index_does_not_cover_are_read_from_their_headers(tmp_path: Path) -> None:
    write_shard(tmp_path, range(10))
    save_index(tmp_path)
    write_shard(tmp_path, range(8, 20))
    with FeatureCache.open(tmp_path) as cache:
        assert cache.unindexed_shards == cache.shard_names()[1:]
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
    assert gone not in index_of(tmp_path).shards


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


@pytest.mark.promise("fork, spawn and few descriptors")
def test_a_cache_takes_64_bytes_a_feature_and_no_more(tmp_path: Path) -> None:
    """Of a table as it is loaded, and as it is after shards have joined it."""
    count, shards = 200_000, 800
    names = [f"{n:012x}-{n:016x}.safetensors" for n in range(shards)]
    saved, table = Saved(tmp_path), make_table(make_rows(count, shards=shards), names)
    data = make_index(table)
    saved.path.write_bytes(data)
    tracemalloc.start()
    try:
        loaded = saved.file.load()
        assert loaded is not None
        assert tracemalloc.get_traced_memory()[0] <= 64 * count
        fresh = join_rows([loaded.rows[:5]])
        fresh["shard"] = 0
        joined = RecordTable.merged([*names, "f" * 41], [(loaded.shards, loaded.rows), (["f" * 41], fresh)])
        del loaded, fresh
        assert len(joined.rows) == count + 5
        assert tracemalloc.get_traced_memory()[0] <= 64 * (count + 5)
    finally:
        tracemalloc.stop()


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

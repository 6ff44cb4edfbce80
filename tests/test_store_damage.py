"""Damaged shards: whatever happens to the bytes, a reader gets the right feature, none, or an error with a name."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import warnings
from pathlib import Path

import pytest

from store_kit import (
    DAMAGE_WARNING,
    equal,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    save_index,
    shard_path,
    shards_dir,
    writable_shard,
    write_shard,
)
from vggt_cache.errors import CorruptRecordError, ShardFormatError, StoreError
from vggt_cache.precompute.verify import verify_records
from vggt_cache.store import FeatureCache, FileSystem, prune
from vggt_cache.store.header import parse_header
from vggt_cache.store.shards import PIECE_BYTES

pytestmark = DAMAGE_WARNING
NUMBERS = (1, 2, 3)


@pytest.fixture(params=["index", "no index"])
def small_store(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A cache directory with one small shard, and the shard's path. The index is from before any damage."""
    name = write_shard(tmp_path, NUMBERS, max_records=len(NUMBERS))
    if request.param == "index":
        save_index(tmp_path)
    path = shard_path(tmp_path, name)
    path.chmod(0o644)
    return tmp_path, path


def answers(cache_dir: Path) -> list[str]:
    """For each number what a reader gets: right, none, or the name of the error. Anything wrong fails the test."""
    result = []
    with FeatureCache.open(cache_dir) as cache:
        for number in NUMBERS:
            try:
                feature = cache.get_by_key(make_key(number))
            except StoreError as error:
                result.append(type(error).__name__)
                continue
            assert feature is None or equal(feature, make_feature(number))
            result.append("none" if feature is None else "right")
        for key in cache:
            try:
                cache.get_by_key(key)
            except StoreError:
                continue
            assert key in map(make_key, NUMBERS)
    return result


@pytest.mark.promise("exact or an error", "Never a wrong feature")
def test_a_flipped_bit_in_any_byte_never_gives_a_wrong_answer(small_store: tuple[Path, Path]) -> None:
    cache_dir, path = small_store
    good, chooser = path.read_bytes(), random.Random(3)
    data_start = min(record.offset for record in parse_header(good, "x").records)
    used = len(good[:data_start].rstrip())
    positions = [
        *range(used + 20),
        *chooser.sample(range(used + 20, data_start), 30),
        *range(data_start, len(good)),
    ]
    record_bytes = (len(good) - data_start) // len(NUMBERS)
    with open(path, "r+b", buffering=0) as file:
        for position in positions:
            os.pwrite(file.fileno(), bytes([good[position] ^ 1 << chooser.randrange(8)]), position)
            found = answers(cache_dir)
            if position >= data_start:
                expected = ["right"] * len(NUMBERS)
                expected[(position - data_start) // record_bytes] = "CorruptRecordError"
                assert found == expected
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert answers(cache_dir) == ["right"] * len(NUMBERS)


@pytest.mark.promise("exact or an error")
def test_a_file_cut_to_any_length_never_gives_a_wrong_answer(small_store: tuple[Path, Path]) -> None:
    cache_dir, path = small_store
    good = path.read_bytes()
    data_start = min(record.offset for record in parse_header(good, "x").records)
    record_bytes = (len(good) - data_start) // len(NUMBERS)
    for length in [*range(0, data_start, 61), *range(data_start, len(good) + 1)]:
        path.write_bytes(good[:length])
        whole = (length - data_start) // record_bytes if length >= data_start else 0
        found = answers(cache_dir)
        if length >= data_start:
            assert found == ["right"] * whole + ["CorruptRecordError"] * (len(NUMBERS) - whole)
        else:
            assert "right" not in found


def test_every_piece_of_a_large_record_is_read_and_checked(tmp_path: Path) -> None:
    spec = make_spec(embed_dim=512)
    feature = make_feature(1, spec, h=80, w=64)
    assert feature.nbytes > 2 * PIECE_BYTES
    path = shard_path(tmp_path, write_shard(tmp_path, {1: feature}, spec), spec)
    path.chmod(0o644)
    with FeatureCache.open(tmp_path) as cache, open(path, "r+b", buffering=0) as file:
        assert equal(cache.get_by_key(make_key(1)), feature)
        size = path.stat().st_size
        for position in range(size - feature.nbytes, size, PIECE_BYTES // 3):
            (byte,) = os.pread(file.fileno(), 1, position)
            os.pwrite(file.fileno(), bytes([byte ^ 1]), position)
            with pytest.raises(CorruptRecordError):
                cache.get_by_key(make_key(1))
            os.pwrite(file.fileno(), bytes([byte]), position)
        assert equal(cache.get_by_key(make_key(1)), feature)


def test_bytes_behind_the_end_harm_no_record(small_store: tuple[Path, Path]) -> None:
    cache_dir, path = small_store
    with path.open("ab") as file:
        file.write(b"x" * 1000)
    assert answers(cache_dir) == ["right"] * len(NUMBERS)


def test_a_file_that_is_cut_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, NUMBERS)
    with FeatureCache.open(tmp_path) as cache:
        assert equal(cache.get_by_key(make_key(1)), make_feature(1))
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CorruptRecordError, match="truncated"):
            cache.get_by_key(make_key(3))


def swap(path: Path, what: str) -> None:
    """Exchange two records by their payloads, their names in the header, or their checksums."""
    data = path.read_bytes()
    first, second = parse_header(data, "x").records[:2]
    length = second.offset - first.offset
    if what == "payloads":
        a, b = data[first.offset : second.offset], data[second.offset : second.offset + length]
        data = data[: first.offset] + b + a + data[second.offset + length :]
    elif what == "names":
        for old, new in (
            (first.key, b"A"),
            (second.key, first.key.hex().encode()),
            (b"", second.key.hex().encode()),
        ):
            data = data.replace(b'"' + (old.hex().encode() or b"A") + b'":{', b'"' + new + b'":{')
    else:
        a, b = first.checksum.hex().encode(), second.checksum.hex().encode()
        data = data.replace(a, b"A" * 32).replace(b, a).replace(b"A" * 32, b)
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["payloads", "names", "checksums"])
def test_swapped_records_are_found_out(tmp_path: Path, what: str) -> None:
    path = writable_shard(tmp_path, NUMBERS)
    swap(path, what)
    assert len(parse_header(path.read_bytes(), "x").records) == 3
    assert answers(tmp_path) == ["CorruptRecordError", "CorruptRecordError", "right"]


@pytest.mark.promise("exact or an error")
def test_a_record_under_another_key_is_found_out(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, NUMBERS)
    stolen = make_key(99)
    path.write_bytes(path.read_bytes().replace(make_key(1).hex().encode(), stolen.hex().encode()))
    with FeatureCache.open(tmp_path) as cache:
        assert cache.get_by_key(make_key(1)) is None
        with pytest.raises(CorruptRecordError):
            cache.get_by_key(stolen)


def test_a_record_with_another_shape_is_found_out(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, NUMBERS)
    path.write_bytes(path.read_bytes().replace(b'"shape":[2,3,4]', b'"shape":[3,2,4]'))
    assert answers(tmp_path) == ["CorruptRecordError"] * 3


def test_the_error_names_record_shard_and_remedy(tmp_path: Path) -> None:
    name = write_shard(tmp_path, NUMBERS)
    path = shard_path(tmp_path, name)
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with FeatureCache.open(tmp_path) as cache, pytest.raises(CorruptRecordError) as caught:
        cache.get_by_key(make_key(3))
    assert str(caught.value) == (
        f"record {make_key(3).hex()} in shard {name} does not match its checksum, so it was damaged after it was "
        f"written: run `vggt-cache prune {tmp_path} --damaged --yes`, then precompute again"
    )


def test_a_later_shard_heals_a_damaged_record(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, NUMBERS)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    save_index(tmp_path)
    write_shard(tmp_path, [3])
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, NUMBERS)
        assert cache.verify_record(make_key(3))
        assert not cache.verify_record(make_key(4))


# ---------------------------------------------------------------- whole shards


def test_a_shard_with_a_bad_header_is_left_out_with_one_warning(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    names = [write_shard(tmp_path, [n]) for n in (2, 3)]
    for name in names:
        shard_path(tmp_path, name).chmod(0o644)
        shard_path(tmp_path, name).write_bytes(b"garbage")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cache = FeatureCache.open(tmp_path, context="frame")
        cache.refresh()
    with cache:
        assert [name for name, _ in cache.damaged_shards] == names
        assert all(name in reason for name, reason in cache.damaged_shards)
        assert holds(cache, [1])
    assert len(caught) == 1
    assert "2 damaged shard(s)" in str(caught[0].message)
    assert "--damaged --yes" in str(caught[0].message)
    assert caught[0].filename == __file__


def test_one_flipped_bit_of_a_header_costs_one_record_at_most_with_or_without_an_index(
    tmp_path: Path,
) -> None:
    """Wherever it is; in the length field, in padding, in the names, in the version, and whatever the codec."""
    for codec in ("none", "lossless"):
        cache_dir = tmp_path / codec
        path = writable_shard(cache_dir, NUMBERS, max_records=3, codec=codec)
        good, chooser = path.read_bytes(), random.Random(7)
        data_start = min(record.offset for record in parse_header(good, "x").records)
        used = len(good[:data_start].rstrip())
        with open(path, "r+b", buffering=0) as file:
            for position in [*range(used), *chooser.sample(range(used, data_start), 40)]:
                os.pwrite(file.fileno(), bytes([good[position] ^ 1 << chooser.randrange(8)]), position)
                found = answers(cache_dir)
                assert found.count("right") >= len(NUMBERS) - 1, (position, found)
                if not 8 <= position < used:
                    assert found == ["right"] * 3
                os.pwrite(file.fileno(), good[position : position + 1], position)


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_a_damaged_header_is_noticed_and_its_records_move_to_a_new_shard(
    tmp_path: Path, context: str
) -> None:
    spec = make_spec(context=context)
    name = write_shard(tmp_path, range(256), spec)
    path = shard_path(tmp_path, name, spec)
    path.chmod(0o644)
    data = path.read_bytes()
    end = min(record.offset for record in parse_header(data, "x").records)
    path.write_bytes(data[: end - 1] + b"!" + data[end:])
    save_index(tmp_path, spec)  # which does not cover it
    with pytest.warns(UserWarning, match="1 damaged shard"):
        cache = FeatureCache.open(tmp_path)
    with cache:
        assert [damaged for damaged, _ in cache.damaged_shards] == [name]
        assert holds(cache, range(256))
    with FeatureCache.open(tmp_path, use_index=False) as cache:
        verdicts = list(verify_records(cache))
    assert [label for label, reason in verdicts if reason] == [name]
    assert len(verdicts) == 257
    prune(tmp_path, dry_run=False)
    assert path.exists(), "only `prune --damaged` repairs"
    prune(tmp_path, dry_run=False, damaged=True)
    assert not path.exists()
    with FeatureCache.open(tmp_path) as cache:
        assert cache.damaged_shards == ()
        assert holds(cache, range(256))


def test_no_shard_is_removed_for_the_sake_of_one_with_a_damaged_header(tmp_path: Path) -> None:
    older = write_shard(tmp_path, [1])
    path = writable_shard(tmp_path, [1, 2], max_records=2)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"}  ", b"} !", 1))
    assert prune(tmp_path, dry_run=False) == []
    assert shard_path(tmp_path, older).exists()


@pytest.mark.parametrize(("shape", "answer"), [(b"[2,3,4]", "right"), (b"[3,2,4]", "none")])
def test_a_name_that_stands_twice_in_a_damaged_header_is_nobodys_unless_it_says_the_same(
    tmp_path: Path, shape: bytes, answer: str
) -> None:
    path = writable_shard(tmp_path, NUMBERS, max_records=4)
    data = path.read_bytes()
    at = data.index(f'"{make_key(1).hex()}":{{'.encode())
    entry = data[at : data.index(b"}", at) + 1].replace(b"[2,3,4]", shape)
    end = len(data[: min(record.offset for record in parse_header(data, "x").records)].rstrip())
    path.write_bytes(data[:end] + entry + data[end + len(entry) :])
    assert answers(tmp_path) == [answer, "right", "right"]


def test_a_copy_of_a_name_that_reaches_into_the_data_takes_nothing_from_it(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, NUMBERS, max_records=3)
    data = path.read_bytes()
    first, _, last = sorted(parse_header(data, "x").records, key=lambda record: record.offset)
    at = data.index(f'"{last.key.hex()}":"'.encode())
    pair = data[at : at + 69]
    begin = first.offset - 30
    path.write_bytes(data[: begin - 1] + b"}" + pair + data[begin + len(pair) :])
    found = answers(tmp_path)
    assert found[NUMBERS.index(next(n for n in NUMBERS if make_key(n) == last.key))] == "right"
    assert found.count("right") == 2


def test_a_shard_of_another_store_is_left_out(tmp_path: Path) -> None:
    other = make_spec(context="causal")
    name = write_shard(tmp_path, [1], other)
    write_shard(tmp_path, [2])
    shutil.copy(shard_path(tmp_path, name, other), shards_dir(tmp_path))
    with FeatureCache.open(tmp_path, context="frame") as cache:
        assert holds(cache, [2])
        assert "belongs to another store" in cache.damaged_shards[0][1]


STRANGE_NAMES = [
    "0123456789ab-0123456789abcdef.safetensors.bak",
    "0123456789AB-0123456789abcdef.safetensors",
    "0123456789ab-0123456789abcdef.safetensors\n",
    "x0123456789ab-0123456789abcdef.safetensors",
    "model.safetensors",
    ".tmp-0123456789abcdef",
    ".nfs0123456789abcdef",
    "\udcff\udcfe",
    "lost+found",
]


def test_files_of_other_names_are_not_looked_at(tmp_path: Path) -> None:
    source = shard_path(tmp_path, write_shard(tmp_path, [1]))
    write_shard(tmp_path, [2])
    content = source.read_bytes()
    source.unlink()
    for name in STRANGE_NAMES:
        (shards_dir(tmp_path) / name).write_bytes(content)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [2])
        assert cache.damaged_shards == ()


@pytest.mark.parametrize("kind", ["symbolic link", "dangling link", "FIFO", "directory", "device"])
def test_what_is_not_a_plain_file_is_not_opened_as_a_shard_and_blocks_nobody(
    tmp_path: Path, kind: str
) -> None:
    content = shard_path(tmp_path, write_shard(tmp_path, [1])).read_bytes()
    path = shards_dir(tmp_path) / "0123456789ab-0123456789abcdef.safetensors"
    if kind == "symbolic link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif os.getuid() == 0:
        try:
            os.mknod(path, 0o600 | 0o020000, os.makedev(1, 5))
        except PermissionError:
            pytest.skip("devices cannot be made here")
    else:
        pytest.skip("only root can make a device")
    with no_descriptor_leaks(), FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])
        ((name, reason),) = cache.damaged_shards
        assert name == path.name
        assert "not a plain file" in reason


@pytest.mark.promise("hostile input")
def test_a_header_that_claims_more_than_there_is_costs_no_memory(tmp_path: Path) -> None:
    """A record of several gigabytes in a file of a few kilobytes."""
    path = writable_shard(tmp_path, [1])
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[make_key(1).hex()].update(shape=[60000, 60000, 4], data_offsets=[0, 60000 * 60000 * 8])
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(length) + data[8 + length :])
    with FeatureCache.open(tmp_path) as cache, pytest.raises(CorruptRecordError, match="beyond the end"):
        cache.get_by_key(make_key(1))


def test_a_damaged_header_is_seen_by_those_who_do_not_use_the_index(small_store: tuple[Path, Path]) -> None:
    cache_dir, path = small_store
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"BF17"', 1))
    with FeatureCache.open(cache_dir, use_index=False) as cache:
        assert [name for name, _ in cache.damaged_shards] == [path.name]
    with pytest.raises(ShardFormatError):
        parse_header(path.read_bytes(), "x")


# ---------------------------------------------------------------- hints


class RefusesHints(FileSystem):
    def __init__(self) -> None:
        self.hinted: list[str] = []

    def expect_scattered_reads(self, fd: int) -> None:
        self.hinted.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_each_open_shard_is_hinted_at_once_and_a_hint_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    names = [write_shard(tmp_path, [number]) for number in range(3)]
    fs = RefusesHints()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        for _ in range(2):
            assert all(equal(cache.get_by_key(make_key(number)), make_feature(number)) for number in range(3))
    assert sorted(fs.hinted) == sorted(names)


def test_files_that_lie_on_no_device_get_no_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hints: list[int] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: hints.append(arguments[3]))
    with open(tmp_path / "file", "wb") as file:
        real = os.fstat(file.fileno())
        asked = [os.POSIX_FADV_RANDOM, os.POSIX_FADV_DONTNEED]
        for device, expected in ((os.makedev(0, 44), []), (os.makedev(8, 1), asked)):
            status = os.stat_result([*real[:2], device, *real[3:]])
            with monkeypatch.context() as patch:
                patch.setattr(os, "fstat", lambda fd, status=status: status)
                FileSystem().expect_scattered_reads(file.fileno())
                FileSystem().begin_write_back(file.fileno(), 0, 1)
            assert hints == expected

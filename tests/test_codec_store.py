"""Packed shards in a store: read like any other, side by side with plain ones, and whatever the damage never wrong."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from safetensors.torch import load_file

from codec_kit import BF16, INT8, KEYS, NUMBERS, given_back, write_packed
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
    write_shard,
)
from vggt_cache.codec import codec_for
from vggt_cache.codec.lossless import Lossless
from vggt_cache.errors import CorruptRecordError, SettingsError, ShardFormatError, StoreError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store, describe, prune
from vggt_cache.store.format import (
    MAX_RECORDS,
    MAX_SIDE,
    build_header,
    reserved_header_bytes,
)
from vggt_cache.store.header import ForeignShardError, parse_header
from vggt_cache.store.index import index_bytes
from vggt_cache.store.record import Record, RecordTable, record_checksum, sort_rows
from vggt_cache.store.tensors import empty_feature

DOCS = Path(__file__).parent.parent / "docs"
pytestmark = DAMAGE_WARNING
both = pytest.mark.parametrize("spec", [BF16, INT8], ids=["lossless", "int8"])


# ---------------------------------------------------------------- what comes back


@both
@pytest.mark.parametrize("indexed", [True, False])
def test_a_packed_feature_comes_back(tmp_path: Path, spec: FeatureSpec, indexed: bool) -> None:
    write_packed(tmp_path, NUMBERS, spec)
    if indexed:
        save_index(tmp_path, spec)
    with no_descriptor_leaks(), FeatureCache.open(tmp_path) as cache:
        for number, key in KEYS.items():
            assert equal(cache.get_by_key(key), given_back(number, spec))
            out = torch.zeros_like(given_back(number, spec))
            assert cache.get_by_key(key, out=out) is out
            assert equal(out, given_back(number, spec))
            assert cache.verify_record(key)
        assert cache.get_by_key(make_key(9)) is None
        with pytest.raises(SettingsError, match="out has shape"):
            cache.get_by_key(KEYS[1], out=torch.zeros(2, 3, 5, dtype=torch.bfloat16))


def test_features_of_any_size_come_back_and_are_smaller_on_disk(tmp_path: Path) -> None:
    spec = make_spec(embed_dim=384)
    features = {n: make_feature(n, spec, h, w) for n, (h, w) in enumerate([(1, 1), (17, 23), (28, 37)])}
    plain = shard_path(tmp_path / "a", write_shard(tmp_path / "a", features, spec), spec)
    path = write_packed(tmp_path / "b", features, spec)
    with FeatureCache.open(tmp_path / "b") as cache:
        assert all(equal(cache.get_by_key(make_key(n)), feature) for n, feature in features.items())
    assert path.stat().st_size < 0.75 * plain.stat().st_size


def test_shards_of_both_kinds_lie_side_by_side_and_the_latest_copy_wins(tmp_path: Path) -> None:
    write_shard(tmp_path, {1: make_feature(8), 2: make_feature(2)})
    write_packed(tmp_path, {1: make_feature(1), 3: make_feature(8)})
    write_shard(tmp_path, [3])
    for index in (False, True):
        if index:
            save_index(tmp_path)
        with FeatureCache.open(tmp_path) as cache:
            assert holds(cache, NUMBERS)


def test_threads_and_forked_processes_read_packed_records(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.get_by_key(KEYS[1]) is not None

        def right(number: int) -> bool:
            return equal(cache.get_by_key(KEYS[number]), make_feature(number))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, NUMBERS * 50))
        child = os.fork()
        if not child:
            os._exit(0 if all(map(right, NUMBERS)) else 1)
        assert os.waitpid(child, 0)[1] == 0


# ---------------------------------------------------------------- the file


class _Fixed(FileSystem):
    def clock_s(self) -> float:
        return 1e9


def test_a_plain_shard_is_what_it_was_before_there_were_codecs(tmp_path: Path) -> None:
    """The digest is that of a file that the last version without codecs wrote."""
    features = {n: torch.arange(24 * n, 24 * n + 24).view(2, 3, 4).bfloat16() for n in NUMBERS}
    name = write_shard(tmp_path, features, fs=_Fixed(), max_records=8)
    digest = hashlib.sha256(shard_path(tmp_path, name).read_bytes()).hexdigest()
    assert digest == "96673349c0cae3eedac9bc361e70459b8cbc8f459345183789b4eec0e520f568"


@both
def test_the_safetensors_library_opens_a_packed_shard(tmp_path: Path, spec: FeatureSpec) -> None:
    path = write_packed(tmp_path, NUMBERS, spec)
    tensors = load_file(path)
    assert sorted(tensors) == sorted(key.hex() for key in KEYS.values())
    assert all(tensor.dtype == torch.uint8 and tensor.ndim == 1 for tensor in tensors.values())
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format_version"] == "2"
    assert metadata["codec"] == ("int8" if spec is INT8 else "lossless")
    assert metadata["spec"] == spec.to_json()
    for key in KEYS.values():
        checksum, h, w = metadata[key.hex()].split(" ")
        assert (len(checksum), h, w) == (32, "2", "3")


@both
def test_an_index_of_another_version_is_ignored_and_replaced(tmp_path: Path, spec: FeatureSpec) -> None:
    """As one that was written when an index was read bucket by bucket: versions 1 and 2."""
    write_packed(tmp_path, NUMBERS, spec)
    index = save_index(tmp_path, spec)
    good = index.read_bytes()
    assert good[8:12] == b"\3\0\0\0"
    for version in (1, 2, 4):
        index.write_bytes(good[:8] + version.to_bytes(4, "little") + good[12:])
        with FeatureCache.open(tmp_path) as cache:
            assert cache.unindexed_shards == cache.shard_names()
            assert sorted(cache) == sorted(KEYS.values())
            assert cache.save_index()
        assert index.read_bytes() == good


def test_the_reserved_header_holds_the_longest_packed_records_there_can_be() -> None:
    for count in (1, 7, 300, MAX_RECORDS):
        start = reserved_header_bytes(BF16, count, "lossless")
        longest = [
            Record(make_key(n), start + 10**15, 10**4, 10**4, make_key(n), 2**32 - 1) for n in range(count)
        ]
        assert len(build_header(BF16, longest, start, "lossless")) == start


def test_the_checksum_covers_the_codec() -> None:
    checksums = {
        record_checksum(BF16, make_key(1), 2, 3, b"x" * 48, name) for name in ("none", "lossless", "int8")
    }
    assert len(checksums) == 3


def test_the_program_in_the_documentation_reads_a_packed_shard_without_our_code(tmp_path: Path) -> None:
    spec = make_spec(embed_dim=384)
    features = {n: make_feature(n, spec, h, w) for n, (h, w) in enumerate([(1, 1), (19, 20)])}
    path = write_packed(tmp_path, features, spec)
    (program,) = re.findall(r"```python\n(.*?)```", (DOCS / "codecs.md").read_text(), re.DOTALL)
    assert "vggt_cache" not in program
    collected: dict[str, torch.Tensor] = {}

    def note(key: str, shape: tuple[int, ...], first: object) -> None:
        collected[key] = torch.from_numpy(names["values"].view("int16").copy()).view(torch.bfloat16)

    names: dict[str, Any] = {"print": note}
    argv, sys.argv = sys.argv, ["program", str(path)]
    try:
        exec(program, names)
    finally:
        sys.argv = argv
    assert all(equal(collected[make_key(n).hex()], feature) for n, feature in features.items())


# ---------------------------------------------------------------- damage


def answers(cache_dir: Path, spec: FeatureSpec) -> list[str]:
    """For each number what a reader gets: right, none, or the name of the error. Anything wrong fails the test."""
    result = []
    with FeatureCache.open(cache_dir) as cache:
        for number, key in KEYS.items():
            try:
                feature = cache.get_by_key(key)
            except StoreError as error:
                result.append(type(error).__name__)
                continue
            assert feature is None or equal(feature, given_back(number, spec))
            result.append("none" if feature is None else "right")
    return result


@both
@pytest.mark.parametrize("indexed", [True, False])
def test_a_flipped_bit_in_any_byte_never_gives_a_wrong_feature(
    tmp_path: Path, spec: FeatureSpec, indexed: bool
) -> None:
    path, chooser = write_packed(tmp_path, NUMBERS, spec), random.Random(3)
    if indexed:
        save_index(tmp_path, spec)
    good = path.read_bytes()
    start = parse_header(good, "x").records[0].offset
    used = len(good[:start].rstrip())
    with open(path, "r+b", buffering=0) as file:
        for position in [*range(used + 4), *range(start, len(good))]:
            os.pwrite(file.fileno(), bytes([good[position] ^ 1 << chooser.randrange(8)]), position)
            found = answers(tmp_path, spec)
            if position >= start:
                assert sorted(found) == ["CorruptRecordError", "right", "right"]
            os.pwrite(file.fileno(), good[position : position + 1], position)
    assert answers(tmp_path, spec) == ["right"] * 3


@both
@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_cut_to_any_length_never_gives_a_wrong_feature(
    tmp_path: Path, spec: FeatureSpec, indexed: bool
) -> None:
    path = write_packed(tmp_path, NUMBERS, spec)
    if indexed:
        save_index(tmp_path, spec)
    good = path.read_bytes()
    records = parse_header(good, "x").records
    start = records[0].offset
    for length in [*range(0, start, 509), *range(start, len(good))]:
        path.write_bytes(good[:length])
        whole = (
            sum(record.offset + record.stored_bytes <= length for record in records) if length >= start else 0
        )
        found = answers(tmp_path, spec)
        assert found.count("right") == whole
        assert found.count("CorruptRecordError") == 3 - whole or length < start


def hostile(tmp_path: Path, spec: FeatureSpec, stored: bytes) -> Path:
    """A shard of one record with these bytes, and a checksum that is right."""
    with ShardWriter(create_store(tmp_path, spec), spec, codec="lossless") as writer:
        writer.append_stored(KEYS[1], 2, 3, memoryview(stored))
        return shard_path(tmp_path, writer.commit(), spec)


def test_a_record_that_cannot_be_unpacked_is_an_error_although_its_checksum_is_right(tmp_path: Path) -> None:
    good = bytes(Lossless().encode(memoryview(bytes(48)), 6, 4))
    hostile(tmp_path, BF16, good[:-3] + b"\xff\xff\xff")
    with FeatureCache.open(tmp_path) as cache, pytest.raises(CorruptRecordError, match="cannot be unpacked"):
        cache.get_by_key(KEYS[1])


def test_the_checksum_is_looked_at_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_packed(tmp_path, NUMBERS)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    unpacked: list[int] = []
    decode = Lossless.decode

    def noted(self: Lossless, stored: memoryview, *rest: Any) -> None:
        unpacked.append(len(stored))
        decode(self, stored, *rest)

    monkeypatch.setattr(Lossless, "decode", noted)
    assert answers(tmp_path, BF16) == ["right", "right", "CorruptRecordError"]
    assert len(unpacked) == 2


def with_json(spec: FeatureSpec, change: Callable[[dict[str, Any], dict[str, Any], str], object]) -> bytes:
    """A packed header of three records; `change` gets it, its metadata and the first record's key."""
    start = reserved_header_bytes(spec, 3, "int8" if spec is INT8 else "lossless")
    records = [Record(KEYS[n], start + 56 * (n - 1), 2, 3, bytes(16), 56) for n in NUMBERS]
    header = json.loads(build_header(spec, records, start, "int8" if spec is INT8 else "lossless")[8:])
    change(header, header["__metadata__"], KEYS[1].hex())
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


def entry(**changes: object) -> Callable[[dict[str, Any], dict[str, Any], str], object]:
    return lambda header, metadata, key: header[key].update(changes)


def checksum(text: object) -> Callable[[dict[str, Any], dict[str, Any], str], object]:
    return lambda header, metadata, key: metadata.update({key: text})


def both_lengths(length: int) -> Callable[[dict[str, Any], dict[str, Any], str], object]:
    """The last record is as long as its span says, and not as its shape allows."""

    def change(header: dict[str, Any], metadata: dict[str, Any], key: str) -> None:
        header[KEYS[3].hex()].update(shape=[length], data_offsets=[112, 112 + length])

    return change


DIGEST = "0" * 32
BAD_HEADERS = {
    "dtype of a plain record": entry(dtype="BF16"),
    "shape of a plain record": entry(shape=[2, 3, 4]),
    "no shape": entry(shape=[]),
    "a length of another span": entry(shape=[57]),
    "a negative length": entry(shape=[-56]),
    "a length that is no integer": entry(shape=[56.0]),
    "a huge length": entry(shape=[2**64]),
    "a gap": entry(data_offsets=[0, 55]),
    "shorter than its shape": both_lengths(24),
    "longer than its shape": both_lengths(5000),
    "longer than an index can say": both_lengths(2**32),
    "a checksum without a grid": checksum(DIGEST),
    "a grid of one side": checksum(f"{DIGEST} 6"),
    "three sides": checksum(f"{DIGEST} 2 3 4"),
    "a side of 0": checksum(f"{DIGEST} 0 3"),
    "a negative side": checksum(f"{DIGEST} -2 3"),
    "a side with a leading zero": checksum(f"{DIGEST} 02 3"),
    "a side over the limit": checksum(f"{DIGEST} 65536 1"),
    "an enormous side": checksum(f"{DIGEST} {'9' * 5000} 1"),
    "a grid that claims a bomb": checksum(f"{DIGEST} 65535 65535"),
    "capital digits": checksum(f"{'A' * 32} 2 3"),
    "a number for a checksum": checksum(7),
    "other digits": checksum(f"{DIGEST} \N{ARABIC-INDIC DIGIT TWO} 3"),
    "no checksum": lambda header, metadata, key: metadata.pop(key),
}


def test_the_header_that_the_bad_ones_are_made_of_is_a_good_one() -> None:
    for spec in (BF16, INT8):
        size = 2 * 4 + 4 * 6 + 24
        assert size == 56
        assert [r.stored_bytes for r in parse_header(with_json(spec, lambda *_: None), "x").records] == [
            56
        ] * 3


@pytest.mark.parametrize("what", BAD_HEADERS)
@both
def test_a_header_that_the_format_does_not_allow_is_refused(spec: FeatureSpec, what: str) -> None:
    with pytest.raises(ShardFormatError, match="shard x cannot be read") as caught:
        parse_header(with_json(spec, BAD_HEADERS[what]), "x")
    assert not isinstance(caught.value, ForeignShardError)


@pytest.mark.parametrize(("h", "w"), [(65536, 1), (1, 99999), (40000, 40000)])
@both
def test_sides_and_lengths_over_the_limit_are_refused_although_they_fit_each_other(
    spec: FeatureSpec, h: int, w: int
) -> None:
    codec = codec_for("int8" if spec is INT8 else "lossless")
    assert codec is not None
    length, _ = codec.size_limits(h * w, 4)
    assert max(h, w) > MAX_SIDE or length >= 2**32

    def change(header: dict[str, Any], metadata: dict[str, Any], key: str) -> None:
        header[KEYS[3].hex()].update(shape=[length], data_offsets=[112, 112 + length])
        metadata[KEYS[3].hex()] = f"{DIGEST} {h} {w}"

    with pytest.raises(ShardFormatError, match=r"a side of more than 65535|more or fewer bytes than codec"):
        parse_header(with_json(spec, change), "x")


@pytest.mark.parametrize("codec", ["zip", "none", "int8", "", None, 7])
def test_another_codec_is_somebodys_good_data(codec: object) -> None:
    data = with_json(BF16, lambda header, metadata, key: metadata.update(codec=codec))
    with pytest.raises(
        ForeignShardError, match="which this program does not know; use the program that wrote it"
    ):
        parse_header(data, "x")


def test_float32_cannot_be_packed_and_int8_must_be() -> None:
    text = make_spec(feature_dtype="float32")
    change = {"spec": text.to_json(), "fingerprint": text.fingerprint}
    with pytest.raises(ForeignShardError):
        parse_header(with_json(BF16, lambda header, metadata, key: metadata.update(change)), "x")
    plain = with_json(INT8, lambda header, metadata, key: metadata.update(format_version="1"))
    with pytest.raises(ShardFormatError, match="int8 is kept in packed ones only"):
        parse_header(plain, "x")


def test_an_index_that_tells_a_wrong_length_is_found_out(tmp_path: Path) -> None:
    write_packed(tmp_path, NUMBERS)
    index = save_index(tmp_path)
    with FeatureCache.open(tmp_path) as cache:
        (name,) = cache.shard_names()
    good = parse_header(shard_path(tmp_path, name, BF16).read_bytes(), "x").rows
    for lie in (lambda n: 0, lambda n: n - 1, lambda n: n + 1, lambda n: 2**32 - 1):
        rows = good.copy()
        rows["stored"] = [lie(int(stored)) for stored in good["stored"]]
        index.write_bytes(b"".join(index_bytes(RecordTable([name], sort_rows(rows)), BF16.fingerprint)))
        with FeatureCache.open(tmp_path) as cache:
            assert cache.unindexed_shards == ()
            assert cache.copies_of(KEYS[1])[0][1].stored_bytes == lie(parse_length(tmp_path))
            assert holds(cache, NUMBERS)


def test_an_index_that_tells_of_a_huge_feature_costs_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forged with a checksum that fits, which anybody can calculate."""
    path = write_packed(tmp_path, NUMBERS)
    index = save_index(tmp_path)
    data = path.read_bytes()
    header = parse_header(data, "x")
    rows = header.rows
    for row, record in zip(rows, header.records, strict=True):
        stored = data[record.offset : record.offset + record.stored_bytes]
        row["h"] = row["w"] = MAX_SIDE
        row["checksum"] = record_checksum(BF16, record.key, MAX_SIDE, MAX_SIDE, stored, "lossless")
    index.write_bytes(b"".join(index_bytes(RecordTable([path.name], sort_rows(rows)), BF16.fingerprint)))
    asked: list[tuple[int, ...]] = []

    def noted(spec: FeatureSpec, shape: tuple[int, ...]) -> torch.Tensor:
        asked.append(shape[:2])
        return empty_feature(spec, shape)

    monkeypatch.setattr("vggt_cache.store.cache.empty_feature", noted)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.copies_of(KEYS[1])[0][1].h == MAX_SIDE
        assert holds(cache, NUMBERS)
    assert set(asked) == {(2, 3)}


def parse_length(cache_dir: Path) -> int:
    (path,) = (cache_dir / BF16.short_name / "shards").iterdir()
    return next(r.stored_bytes for r in parse_header(path.read_bytes(), "x").records if r.key == KEYS[1])


# ---------------------------------------------------------------- what needs no other package


def test_without_zstandard_a_packed_record_says_what_to_install_and_a_plain_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_packed(tmp_path, [1])
    write_shard(tmp_path, [2])
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with FeatureCache.open(tmp_path) as cache:
        assert equal(cache.get_by_key(KEYS[2]), make_feature(2))
        with pytest.raises(SettingsError, match="zstandard"):
            cache.get_by_key(KEYS[1])
    with pytest.raises(SettingsError, match="zstandard"):
        write_packed(tmp_path, [3])
    assert describe(tmp_path).stores[0].codecs == {"lossless": 1, "none": 1}


# ---------------------------------------------------------------- upkeep


@both
def test_prune_repairs_a_packed_shard_and_keeps_it_packed(tmp_path: Path, spec: FeatureSpec) -> None:
    path = write_packed(tmp_path, NUMBERS, spec)
    stored = {r.key: r.checksum for r in parse_header(path.read_bytes(), "x").records}
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert len(prune(tmp_path, damaged=True, dry_run=False)) == 1
    (new,) = path.parent.glob("*.safetensors")
    header = parse_header(new.read_bytes(), "x")
    assert header.codec == ("int8" if spec is INT8 else "lossless")
    assert {r.key: r.checksum for r in header.records} == {KEYS[n]: stored[KEYS[n]] for n in (1, 2)}
    with FeatureCache.open(tmp_path) as cache:
        assert all(equal(cache.get_by_key(KEYS[n]), given_back(n, spec)) for n in (1, 2))


def test_prune_removes_a_packed_shard_only_where_newer_copies_are_intact(tmp_path: Path) -> None:
    old = write_packed(tmp_path, NUMBERS)
    new = write_packed(tmp_path, NUMBERS)
    good = new.read_bytes()
    new.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert prune(tmp_path, dry_run=False) == []
    new.write_bytes(good)
    assert [action.path for action in prune(tmp_path, dry_run=False)] == [str(old)]


@both
def test_a_description_tells_codecs_and_what_they_save(tmp_path: Path, spec: FeatureSpec) -> None:
    path = write_packed(tmp_path, NUMBERS, spec)
    (store,) = describe(tmp_path).stores
    records = parse_header(path.read_bytes(), "x").records
    assert store.codecs == {"int8" if spec is INT8 else "lossless": 1}
    assert store.raw_bytes == 3 * 48
    assert store.stored_bytes == sum(record.stored_bytes for record in records)


def test_a_writer_takes_no_bytes_that_its_codec_does_not_make(tmp_path: Path) -> None:
    with ShardWriter(create_store(tmp_path, BF16), BF16, codec="lossless") as writer:
        for length in (0, 24, 48 + 4 + 1024 + 1):
            with pytest.raises(SettingsError, match="are no feature of 2 x 3 patches"):
                writer.append_stored(KEYS[1], 2, 3, memoryview(bytes(length)))
        with pytest.raises(SettingsError, match="are no feature of 2 x 3 patches"):
            writer.append_payload(KEYS[1], 2, 3, memoryview(bytes(47)))
        writer.append(KEYS[1], make_feature(1))
        writer.commit()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [1])


# ---------------------------------------------------------------- memory that is read into


class NotesMemory(FileSystem):
    """Where each read of a record was put."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().preadv(fd, buffers, offset)
        if offset and count:  # not the header
            self.addresses.append(np.frombuffer(buffers[0], np.uint8).ctypes.data)
        return count


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_records_are_read_into_memory_that_processors_copy_to_fast(tmp_path: Path, codec: str) -> None:
    write_shard(tmp_path, NUMBERS, codec=codec)
    fs = NotesMemory()
    with FeatureCache.open(tmp_path, fs=fs) as cache:
        assert all(equal(cache.get_by_key(KEYS[number]), make_feature(number)) for number in NUMBERS)
    prune(tmp_path, damaged=True, dry_run=True, fs=fs)  # reads every record too
    assert len(fs.addresses) >= 2 * len(NUMBERS)
    assert {address % 64 for address in fs.addresses} == {0}

"""Reading past the page cache: the same answers as through it, nothing left in memory, and never in the way."""

from __future__ import annotations

import errno
import mmap
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from store_kit import (
    TracedFileSystem,
    equal,
    failing,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    shard_path,
    writable_shard,
    write_shard,
)
from vggt_cache.errors import CorruptRecordError, SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store import FeatureCache, FileSystem, direct
from vggt_cache.store.shards import PIECE_BYTES

NUMBERS = (1, 2, 3)
IN_BLOCKS = make_spec(embed_dim=1024)
"""A token of its features is 4096 bytes, as VGGT-1B's are."""


@pytest.fixture(scope="module", autouse=True)
def direct_reads(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("direct") / "file"
    file.write_bytes(bytes(4096))
    with open(file, "rb") as opened:
        try:
            os.close(FileSystem().reopen_direct(opened.fileno()))
        except OSError as error:
            pytest.skip(f"the temporary directory's file system has no O_DIRECT ({error.strerror})")


def opened(cache_dir: Path, io: str = "direct", **options: Any) -> FeatureCache:
    return FeatureCache.open(cache_dir, context="frame", io=io, **options)


def bytes_in_page_cache(path: Path) -> int:
    """Of the file's blocks those that can be read at once, without asking the disk."""
    found = 0
    with open(path, "rb") as file:
        # Asking has the block fetched, and without this hint those behind it too.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for offset in range(0, os.fstat(file.fileno()).st_size, 4096):
            try:
                found += os.preadv(file.fileno(), [bytearray(4096)], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                continue
    return found


def drop(path: Path) -> None:
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.parametrize("feature_dtype", ["bfloat16", "float32", "int8"])
@pytest.mark.parametrize("embed_dim", [2, 1024])
def test_features_read_past_the_page_cache_are_those_read_through_it(
    tmp_path: Path, feature_dtype: str, embed_dim: int
) -> None:
    spec = make_spec(feature_dtype=feature_dtype, embed_dim=embed_dim)
    write_shard(tmp_path, NUMBERS, spec)
    with opened(tmp_path) as past, opened(tmp_path, "buffered") as through:
        for number in NUMBERS:
            expected = through.get_by_key(make_key(number))
            assert expected is not None
            assert equal(past.get_by_key(make_key(number)), expected)
            unaligned = torch.empty(expected.numel() + 1, dtype=expected.dtype)[1:].view(expected.shape)
            assert equal(past.get_by_key(make_key(number), out=unaligned), expected)


def test_packed_features_and_those_of_several_pieces_are_read_too(tmp_path: Path) -> None:
    large = torch.randn(2, PIECE_BYTES // 4096 + 3, 4).bfloat16().repeat(1, 1, 512)
    packed = make_feature(5, IN_BLOCKS)
    write_shard(tmp_path, {4: large}, IN_BLOCKS)
    write_shard(tmp_path, {5: packed}, IN_BLOCKS, codec="lossless")
    with opened(tmp_path) as cache:
        assert equal(cache.get_by_key(make_key(4)), large)
        assert equal(cache.get_by_key(make_key(5)), packed)


def test_what_is_read_leaves_nothing_in_the_page_cache(tmp_path: Path) -> None:
    paths = {}
    for io in ("direct", "buffered"):
        cache_dir = tmp_path / io
        name = write_shard(cache_dir, NUMBERS, IN_BLOCKS)
        paths[io] = shard_path(cache_dir, name, IN_BLOCKS)
        with opened(cache_dir, io) as cache:
            drop(paths[io])
            assert holds(cache, NUMBERS)
    assert bytes_in_page_cache(paths["direct"]) == 0
    assert bytes_in_page_cache(paths["buffered"]) >= 3 * 2 * 3 * 4096


def error_of(cache: FeatureCache, number: int) -> str:
    try:
        feature = cache.get_by_key(make_key(number))
    except CorruptRecordError as error:
        return str(error)
    assert equal(feature, make_feature(number, cache.spec))
    return "right"


@pytest.mark.promise("exact or an error")
@pytest.mark.parametrize("spec", [make_spec(), IN_BLOCKS], ids=["small", "in blocks"])
def test_damage_is_told_as_it_is_through_the_page_cache(tmp_path: Path, spec: FeatureSpec) -> None:
    path = writable_shard(tmp_path, NUMBERS, spec)
    good = path.read_bytes()
    with opened(tmp_path) as past, opened(tmp_path, "buffered") as through:
        first = through.record_of(make_key(1))
        assert first is not None
        answers = []
        for at in (first.offset, first.offset + 30, len(good) - 1):
            path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            answers.append([error_of(past, number) for number in NUMBERS])
            assert answers[-1] == [error_of(through, number) for number in NUMBERS]
        for length in (len(good) - 1, first.offset + 30, first.offset, first.offset - 1, 10):
            path.write_bytes(good[:length])
            answers.append([error_of(past, number) for number in NUMBERS])
            assert answers[-1] == [error_of(through, number) for number in NUMBERS]
    assert all(any(answer != "right" for answer in of_all) for of_all in answers)


@pytest.mark.parametrize("operation", ["reopen_direct", "preadv"])
def test_a_file_system_that_refuses_is_read_through_the_page_cache(tmp_path: Path, operation: str) -> None:
    """Some refuse the flag; others take it, and refuse the first read."""
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)
    fs = TracedFileSystem()

    def refuse_direct(name: str, position: int, call: Any) -> Any:
        fresh = fs.operations[:position].count("reopen_direct")
        reads_after = fs.operations[:position][::-1].index("reopen_direct") if fresh else -1
        if name == operation and (operation == "reopen_direct" or (fresh and reads_after <= 1)):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call()

    fs._fault = refuse_direct
    with (
        no_descriptor_leaks(),
        pytest.warns(UserWarning, match="past the page cache .Invalid argument") as told,
        opened(tmp_path, fs=fs) as cache,
    ):
        assert holds(cache, NUMBERS)
    assert len(told) == 1


def test_auto_says_nothing_where_a_file_system_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vggt_cache.store.cache.is_larger_than_memory", lambda size_bytes: True)
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)
    fs = failing("reopen_direct", errno.EINVAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opened(tmp_path, "auto", fs=fs) as cache:
            assert holds(cache, NUMBERS)
    assert fs.operations.count("reopen_direct") == 1


def test_a_read_that_ends_within_a_block_is_finished_through_the_page_cache(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)

    class Stumbling(FileSystem):
        def preadv(self, fd: int, buffers: Any, offset: int) -> int:
            return super().preadv(fd, buffers, offset) - (len(buffers[0]) > 4096)

    with opened(tmp_path, fs=Stumbling()) as cache:
        assert holds(cache, NUMBERS)


def test_bytes_that_miss_their_memory_are_read_again_and_no_damage(tmp_path: Path) -> None:
    """As where the process forks while a read past the page cache is under way."""
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)

    class Missing(FileSystem):
        def reopen_direct(self, fd: int) -> int:
            self.direct_fd = super().reopen_direct(fd)
            return self.direct_fd

        def preadv(self, fd: int, buffers: Any, offset: int) -> int:
            if fd == getattr(self, "direct_fd", None):
                return len(buffers[0])
            return super().preadv(fd, buffers, offset)

    with opened(tmp_path, fs=Missing()) as cache:
        assert holds(cache, NUMBERS)


def test_auto_reads_past_the_page_cache_where_a_cache_is_larger_than_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)
    weighed: list[int] = []

    def with_memory_of(free_bytes: int) -> list[str]:
        def is_larger(size_bytes: int) -> bool:
            weighed.append(size_bytes)
            return size_bytes > free_bytes

        monkeypatch.setattr("vggt_cache.store.cache.is_larger_than_memory", is_larger)
        fs = TracedFileSystem()
        with opened(tmp_path, "auto", fs=fs) as cache:
            assert holds(cache, NUMBERS)
        return fs.operations

    stored = 3 * 2 * 3 * 4096
    assert "reopen_direct" in with_memory_of(stored - 1)
    assert "reopen_direct" not in with_memory_of(stored)
    assert weighed == [stored, stored]


def test_what_is_larger_than_memory_is_asked_of_the_system() -> None:
    assert not direct.is_larger_than_memory(1)
    assert direct.is_larger_than_memory(10**15)


def test_buffered_never_reads_past_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggt_cache.store.cache.is_larger_than_memory", lambda size_bytes: True)
    write_shard(tmp_path, NUMBERS, IN_BLOCKS)
    fs = TracedFileSystem()
    with opened(tmp_path, "buffered", fs=fs) as cache:
        assert holds(cache, NUMBERS)
    assert "reopen_direct" not in fs.operations


@pytest.mark.parametrize("embed_dim", [2, 1024])
def test_memory_that_cannot_be_written_is_refused_and_no_crash(tmp_path: Path, embed_dim: int) -> None:
    spec = make_spec(embed_dim=embed_dim)
    write_shard(tmp_path, NUMBERS, spec)
    feature = make_feature(1, spec)
    (tmp_path / "mapped").write_bytes(bytes(feature.nbytes))
    with open(tmp_path / "mapped", "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of memory that cannot be written
        mapped = torch.frombuffer(
            mmap.mmap(file.fileno(), feature.nbytes, prot=mmap.PROT_READ), dtype=feature.dtype
        )
    with opened(tmp_path) as cache, pytest.raises(SettingsError, match="cannot be written"):
        cache.get_by_key(make_key(1), out=mapped.view(feature.shape))


def test_threads_and_other_processes_read_in_the_same_way(tmp_path: Path) -> None:
    write_shard(tmp_path, range(20), make_spec())
    with no_descriptor_leaks():
        cache = opened(tmp_path)
        assert pickle.loads(pickle.dumps(cache)).io == "direct"  # noqa: S301
        assert cache.with_shards(cache.shard_names()).io == "direct"

        def right(number: int) -> bool:
            return equal(cache.get_by_key(make_key(number % 20)), make_feature(number % 20))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(right, range(400)))
        if (child := os.fork()) == 0:
            os._exit(0 if all(map(right, range(20))) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        cache.close()


def test_another_way_of_reading_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path, NUMBERS)
    with pytest.raises(SettingsError, match="io is 'mmap', which is not one of auto, direct, buffered"):
        opened(tmp_path, "mmap")


def test_the_environment_says_how_where_nobody_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(tmp_path, NUMBERS)
    monkeypatch.setenv("VGGT_CACHE_IO", "direct")
    assert FeatureCache.open(tmp_path, context="frame").io == "direct"
    assert opened(tmp_path, "buffered").io == "buffered"
    monkeypatch.setenv("VGGT_CACHE_IO", "mmap")
    with pytest.raises(SettingsError, match="VGGT_CACHE_IO is 'mmap'"):
        FeatureCache.open(tmp_path, context="frame")

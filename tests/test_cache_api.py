"""FeatureCache as a trainer uses it."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggt_cache
from store_kit import (
    DAMAGE_WARNING,
    SPEC,
    equal,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    shard_path,
    shards_dir,
    writable_shard,
    write_shard,
)
from vggt_cache.errors import CacheAccessError, CorruptRecordError, FrameError, SettingsError
from vggt_cache.identity import FeatureSpec, feature_key, frame_digest
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store

CAUSAL = make_spec(context="causal")


def draw(path: Path, colour: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (28, 28), (colour, 0, 0)).save(path)
    return path


def store_for_frames(cache_dir: Path, spec: FeatureSpec, lists: dict[int, list[Path]]) -> None:
    """Under each list's key the feature of its number."""
    with ShardWriter(create_store(cache_dir, spec), spec) as writer:
        for number, paths in lists.items():
            key = feature_key(spec, [frame_digest(path.read_bytes()) for path in paths])
            writer.append(key, make_feature(number, spec))
        writer.commit()


@pytest.fixture
def frames(tmp_path: Path) -> list[Path]:
    return [draw(tmp_path / "data" / f"{n:03d}.png", n) for n in range(4)]


# ---------------------------------------------------------------- by frames


def test_in_frame_context_a_feature_belongs_to_the_last_frame_alone(
    tmp_path: Path, frames: list[Path]
) -> None:
    store_for_frames(tmp_path / "cache", SPEC, {n: [frames[n]] for n in range(3)})
    with FeatureCache.open(tmp_path / "cache") as cache:
        for n in range(3):
            assert equal(cache.get([frames[n]]), make_feature(n))
            assert equal(cache.get([frames[3], "no/such/file", frames[n]]), make_feature(n))
        assert cache.get([frames[0], frames[3]]) is None


def test_in_causal_context_a_feature_belongs_to_the_ordered_list(tmp_path: Path, frames: list[Path]) -> None:
    a, b, c, _ = frames
    store_for_frames(tmp_path / "cache", CAUSAL, {1: [a], 2: [a, b], 3: [b, a], 4: [a, b, c]})
    with FeatureCache.open(tmp_path / "cache") as cache:
        assert equal(cache.get([a]), make_feature(1))
        assert equal(cache.get([a, b]), make_feature(2))
        assert equal(cache.get([b, a]), make_feature(3))
        assert equal(cache.get([a, b, c]), make_feature(4))
        for absent in ([b], [b, c], [a, a], [a, c, b]):
            assert cache.get(absent) is None
        with pytest.raises(FrameError):
            cache.get([a, "no/such/file", b])


def test_frames_may_be_given_as_paths_of_any_kind_or_as_bytes(
    tmp_path: Path, frames: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    store_for_frames(tmp_path / "cache", CAUSAL, {7: frames[:2]})
    a, b = frames[:2]
    with FeatureCache.open(tmp_path / "cache", root=tmp_path / "data") as cache:
        for given in (["000.png", "001.png"], [a, str(b)], [a.read_bytes(), "001.png"], (Path("000.png"), b)):
            assert equal(cache.get(given), make_feature(7))
    with FeatureCache.open(tmp_path / "cache") as cache:
        with pytest.raises(FrameError):
            cache.get(["000.png", "001.png"])
        monkeypatch.chdir(tmp_path / "data")
        assert equal(cache.get(["000.png", "001.png"]), make_feature(7))
        assert cache.key_of([a, b]) == cache.key_of([a.read_bytes(), b.read_bytes()])


@pytest.mark.promise("Never a wrong feature")
def test_a_frame_that_was_replaced_with_its_size_and_time_kept_does_not_get_the_old_feature(
    tmp_path: Path, frames: list[Path]
) -> None:
    store_for_frames(tmp_path / "cache", SPEC, {0: [frames[0]]})
    with FeatureCache.open(tmp_path / "cache") as cache:
        assert equal(cache.get([frames[0]]), make_feature(0))
        status = frames[0].stat()
        content = bytearray(frames[0].read_bytes())
        content[-20] ^= 1
        frames[0].write_bytes(content)
        os.utime(frames[0], ns=(status.st_atime_ns, status.st_mtime_ns))
        assert frames[0].stat().st_size == status.st_size
        assert frames[0].stat().st_mtime_ns == status.st_mtime_ns
        assert cache.get([frames[0]]) is None


def test_a_moved_frame_keeps_its_feature(tmp_path: Path, frames: list[Path]) -> None:
    store_for_frames(tmp_path / "cache", SPEC, {0: [frames[0]]})
    frames[0].rename(tmp_path / "elsewhere.png")
    with FeatureCache.open(tmp_path / "cache") as cache:
        assert equal(cache.get([tmp_path / "elsewhere.png"]), make_feature(0))


def test_frames_may_be_given_by_anything_that_yields_them(tmp_path: Path, frames: list[Path]) -> None:
    store_for_frames(tmp_path / "cache", CAUSAL, {7: frames[:2]})
    a, b = frames[:2]
    with FeatureCache.open(tmp_path / "cache") as cache:
        for given in (
            (path for path in (a, b)),
            np.array([str(a), str(b)]),
            [bytearray(a.read_bytes()), memoryview(b.read_bytes())],
            dict.fromkeys((a, b)),
        ):
            assert equal(cache.get(given), make_feature(7))


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, 28, 28, 4), np.uint8),
        [None],
        [3],
    ],
    ids=["array", "None", "int"],
)
def test_what_is_no_frame_is_refused_in_one_sentence(tmp_path: Path, wrong: Any) -> None:
    write_shard(tmp_path, [1])
    message = r"a frame is .*(path of an image file is needed|pixels are \[3, H, W\])"
    with FeatureCache.open(tmp_path) as cache, pytest.raises(SettingsError, match=message):
        cache.get(wrong)


@pytest.mark.parametrize("wrong", [iter(()), None, 5, bytearray(b"bytes"), np.array([])])
def test_no_frames_at_all_are_refused(tmp_path: Path, wrong: Any) -> None:
    write_shard(tmp_path, [1])
    with (
        FeatureCache.open(tmp_path) as cache,
        pytest.raises(SettingsError, match="a list of frames is needed"),
    ):
        cache.get(wrong)


@pytest.mark.parametrize("wrong", ["000.png", b"bytes", Path("000.png"), [], ()])
def test_frames_that_are_no_list_are_refused(tmp_path: Path, wrong: object) -> None:
    write_shard(tmp_path, [1])
    with (
        FeatureCache.open(tmp_path) as cache,
        pytest.raises(SettingsError, match="a list of frames is needed"),
    ):
        cache.get(wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------- by key


@pytest.mark.promise("exact or an error")
@pytest.mark.parametrize("feature_dtype", ["bfloat16", "float16", "float32"])
def test_a_feature_comes_back_as_it_was_stored(tmp_path: Path, feature_dtype: str) -> None:
    """Bits, dtype and shape; also values that are no numbers, which arithmetic would change."""
    spec = make_spec(feature_dtype=feature_dtype)
    odd = make_feature(1, spec, h=5, w=2)
    odd[0, 0, 0], odd[0, 0, 1], odd[0, 0, 2] = float("nan"), -0.0, float("inf")
    write_shard(tmp_path, {1: odd, 2: make_feature(2, spec, h=1, w=1)}, spec)
    with FeatureCache.open(tmp_path) as cache:
        assert equal(cache.get_by_key(make_key(1)), odd)
        assert equal(cache.get_by_key(make_key(2)), make_feature(2, spec, h=1, w=1))
        assert cache.get_by_key(make_key(3)) is None


def test_a_feature_is_the_callers_own(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    with FeatureCache.open(tmp_path) as cache:
        first = cache.get_by_key(make_key(1))
        assert first is not None
        first.zero_()
        assert equal(cache.get_by_key(make_key(1)), make_feature(1))


def test_a_feature_can_be_read_into_memory_of_the_caller(tmp_path: Path) -> None:
    write_shard(tmp_path, [1, 2])
    with FeatureCache.open(tmp_path) as cache:
        ring = torch.zeros(3, 2, 3, 4, dtype=torch.bfloat16)
        for slot, number in enumerate((1, 2)):
            target = ring[slot]
            assert cache.get_by_key(make_key(number), out=target) is target
        assert equal(ring[0], make_feature(1))
        assert equal(ring[1], make_feature(2))
        assert ring[2].count_nonzero() == 0
        assert cache.get_by_key(make_key(9), out=ring[2]) is None


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(2, 3, 4),
        torch.zeros(3, 2, 4, dtype=torch.bfloat16),
        torch.zeros(24, dtype=torch.bfloat16),
        torch.zeros(2, 4, 3, dtype=torch.bfloat16).transpose(1, 2),
        torch.zeros(2, 3, 4, dtype=torch.bfloat16, device="meta"),
    ],
    ids=["dtype", "shape", "flat", "strided", "device"],
)
def test_memory_that_does_not_fit_is_refused_and_not_touched(tmp_path: Path, out: torch.Tensor) -> None:
    write_shard(tmp_path, [1])
    with FeatureCache.open(tmp_path) as cache:
        with pytest.raises(SettingsError, match=r"out has shape .* give such a tensor, or none"):
            cache.get_by_key(make_key(1), out=out)
        assert out.is_meta or out.count_nonzero() == 0


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_a_feature_is_read_to_the_cpu_whatever_torchs_default_device_is(tmp_path: Path, codec: str) -> None:
    write_shard(tmp_path, [1], codec=codec)
    eight_bit = make_spec(feature_dtype="int8")
    write_shard(tmp_path, [2], eight_bit)
    with (
        FeatureCache.open(tmp_path, spec=SPEC) as cache,
        FeatureCache.open(tmp_path, spec=eight_bit) as small,
    ):
        expected = small.get_by_key(make_key(2))
        assert expected is not None
        with torch.device("meta"):
            found = cache.get_by_key(make_key(1))
            rounded = small.get_by_key(make_key(2))
            encoded = small.get_encoded(make_key(2))
            assert encoded is not None
            decoded = encoded.decode()
        assert equal(found, make_feature(1))
        assert equal(rounded, expected)
        assert equal(decoded, expected)


def read_into_read_only_memory(cache_dir: Path, spec: FeatureSpec, file: Path) -> str:
    file.write_bytes(bytes(4096))
    with FeatureCache.open(cache_dir, spec=spec) as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = np.memmap(file, np.uint8, "r")
        out = torch.from_numpy(mapped)[:48].view(torch.bfloat16).view(2, 3, 4)
        try:
            cache.get_by_key(make_key(1), out=out)
        except SettingsError as error:
            return str(error)
    return "it was read"


def _report(send: Any, *arguments: Any) -> None:
    send.send(read_into_read_only_memory(*arguments))


@pytest.mark.parametrize(
    ("codec", "feature_dtype"), [("none", "bfloat16"), ("lossless", "bfloat16"), ("none", "int8")]
)
def test_memory_that_is_mapped_for_reading_is_refused(tmp_path: Path, codec: str, feature_dtype: str) -> None:
    """In a process of its own: the system kills one that writes there."""
    spec = make_spec(feature_dtype=feature_dtype)
    write_shard(tmp_path / "cache", [1], spec, codec=codec)
    receive, send = multiprocessing.Pipe(duplex=False)
    arguments = (send, tmp_path / "cache", spec, tmp_path / "file")
    process = multiprocessing.get_context("fork").Process(target=_report, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert "memory that cannot be written" in receive.recv()


@pytest.mark.parametrize("wrong", [b"short", b"x" * 17, "0" * 32, None, 5])
def test_what_is_no_key_is_refused_and_is_not_in_the_cache(tmp_path: Path, wrong: object) -> None:
    write_shard(tmp_path, [1])
    with FeatureCache.open(tmp_path) as cache:
        assert wrong not in cache
        for ask in (cache.get_by_key, cache.verify_record, cache.shard_of):
            with pytest.raises(SettingsError, match="16 bytes"):
                ask(wrong)  # type: ignore[operator]


def test_keys_come_once_and_in_order(tmp_path: Path) -> None:
    for numbers in (range(10), range(5, 15), range(12, 20)):
        write_shard(tmp_path, numbers)
    with FeatureCache.open(tmp_path) as cache:
        assert list(cache.keys()) == list(cache) == sorted(make_key(n) for n in range(20))
        assert len(cache) == 20
        assert make_key(3) in cache
        assert make_key(20) not in cache


def test_iterating_needs_nothing_but_the_iterator(tmp_path: Path) -> None:
    """`for key in FeatureCache.open(...)`: nobody else holds the cache, and nothing of it is left open."""
    write_shard(tmp_path, range(5))
    wanted = sorted(make_key(n) for n in range(5))
    with no_descriptor_leaks():
        assert [key for key in FeatureCache.open(tmp_path)] == wanted  # noqa: C416
        cache = FeatureCache.open(tmp_path)
        keys = cache.keys()
        first = next(keys)
        cache.close()
        assert [first, *keys] == wanted


def test_an_empty_cache_has_nothing(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [])
        assert cache.get_by_key(make_key(1)) is None
        assert cache.shard_of(make_key(1)) is None
        assert cache.save_index()
    with FeatureCache.open(tmp_path) as cache:
        assert holds(cache, [])


# ---------------------------------------------------------------- the snapshot


def test_the_snapshot_is_the_same_for_the_same_set_of_shards_and_for_no_other(tmp_path: Path) -> None:
    names = [write_shard(tmp_path / "a", [n]) for n in range(3)]
    create_store(tmp_path / "c", CAUSAL)

    def snapshot(place: str) -> str:
        with FeatureCache.open(tmp_path / place) as cache:
            return cache.snapshot

    create_store(tmp_path / "b", SPEC)
    seen = {snapshot("a"), snapshot("b"), snapshot("c")}
    for name in reversed(names):
        shards_dir(tmp_path / "b").joinpath(name).write_bytes(shard_path(tmp_path / "a", name).read_bytes())
        seen.add(snapshot("b"))
    assert snapshot("a") == snapshot("b")
    assert len(seen) == 5


def test_stats_count_what_was_read(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    with FeatureCache.open(tmp_path) as cache:
        assert cache.stats == vggt_cache.store.CacheStats()
        for number in (0, 1, 1, 7):
            cache.get_by_key(make_key(number))
        assert (cache.stats.hits, cache.stats.misses, cache.stats.bytes_read) == (3, 1, 3 * 48)
        assert cache.stats.read_s > 0
        assert make_key(1) in cache
        cache.verify_record(make_key(1))
        assert cache.stats.hits == 3


def test_stats_lose_nothing_among_threads(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    with FeatureCache.open(tmp_path) as cache:

        def read() -> None:
            for number in range(400):
                cache.get_by_key(make_key(number % 4))

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (cache.stats.hits, cache.stats.misses) == (1200, 400)


@DAMAGE_WARNING
def test_verifying_a_record_reads_it(tmp_path: Path) -> None:
    path = writable_shard(tmp_path, [1, 2])
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with FeatureCache.open(tmp_path) as cache:
        assert cache.verify_record(make_key(1)) is True
        assert cache.verify_record(make_key(3)) is False
        with pytest.raises(CorruptRecordError):
            cache.verify_record(make_key(2))


def test_a_closed_cache_says_so(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    with no_descriptor_leaks():
        cache = FeatureCache.open(tmp_path)
        cache.close()
        cache.close()
        for ask in (
            lambda: cache.get_by_key(make_key(1)),
            lambda: make_key(1) in cache,
            lambda: len(cache),
            lambda: list(cache.keys()),
            cache.refresh,
            cache.save_index,
        ):
            with pytest.raises(CacheAccessError, match="was closed"):
                ask()


def test_closing_while_others_read_harms_no_read(tmp_path: Path) -> None:
    """Each read ends with its feature, or is told that the cache was closed; never that it is damaged."""
    for number in range(8):
        write_shard(tmp_path, [number])
    said: list[BaseException] = []
    for _ in range(25):
        cache = FeatureCache.open(tmp_path)
        began = threading.Barrier(4)

        def read(seed: int, cache: FeatureCache = cache, began: threading.Barrier = began) -> None:
            began.wait()
            try:
                for step in range(10_000):
                    number = (seed + step) % 8
                    assert equal(cache.get_by_key(make_key(number)), make_feature(number))
            except BaseException as error:
                said.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        began.wait()
        cache.close()
        files = [open(os.devnull, "rb") for _ in range(20)]  # noqa: SIM115  take the numbers that were freed
        for thread in threads:
            thread.join()
        for file in files:
            file.close()
    assert len(said) == 75
    assert {(type(error), "was closed" in str(error)) for error in said} == {(CacheAccessError, True)}


def test_a_read_that_is_under_way_keeps_its_file_when_the_cache_is_closed(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])

    class ClosesInTheMiddle(FileSystem):
        def preadv(self, fd: int, buffers: Any, offset: int) -> int:
            if reading:
                cache.close()
            return super().preadv(fd, buffers, offset)

    reading: list[bool] = []
    with no_descriptor_leaks():
        cache = FeatureCache.open(tmp_path, fs=ClosesInTheMiddle())
        reading.append(True)
        assert equal(cache.get_by_key(make_key(1)), make_feature(1))
        with pytest.raises(CacheAccessError, match="was closed"):
            cache.get_by_key(make_key(1))


def test_a_refresh_follows_a_directory_that_was_removed_and_made_again(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1, 2])
    with no_descriptor_leaks(), FeatureCache.open(tmp_path / "cache") as cache:
        assert holds(cache, [1, 2])
        shutil.rmtree(tmp_path / "cache")
        write_shard(tmp_path / "cache", [2, 3])
        cache.refresh()
        assert holds(cache, [2, 3])


def test_refreshing_beside_reads_disturbs_none(tmp_path: Path) -> None:
    """Each refresh opens the folder anew, and shards are opened all the time."""
    for number in range(8):
        write_shard(tmp_path, [number])
    with no_descriptor_leaks(), FeatureCache.open(tmp_path) as cache:
        cache.open_shards.limit = 1
        wrong: list[object] = []

        def read(seed: int) -> None:
            try:
                for step in range(400):
                    number = (seed + step) % 8
                    assert equal(cache.get_by_key(make_key(number)), make_feature(number))
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            cache.refresh()
        for thread in threads:
            thread.join()
        assert wrong == []


def test_looking_at_a_cache_loads_no_torch(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    code = (
        "import sys; from vggt_cache.store import describe, list_stores, prune; from vggt_cache.cli import main\n"
        f"assert len(list_stores({str(tmp_path)!r})) == len(describe({str(tmp_path)!r}).stores) == 1\n"
        f"prune({str(tmp_path)!r})\nassert main(['info', {str(tmp_path)!r}]) == 0\n"
        "assert 'torch' not in sys.modules, 'torch was loaded'"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_package_offers_the_cache_under_its_own_name() -> None:
    assert vggt_cache.FeatureCache is FeatureCache

"""Features on their way to the disk: what is refused, what waits for what, and what an error leaves behind."""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from codec_kit import INT8, given_back
from store_kit import (
    SPEC,
    Call,
    TracedFileSystem,
    equal,
    failing,
    holds,
    make_feature,
    make_key,
    make_spec,
    no_descriptor_leaks,
    temp_files,
)
from vggt_cache.codec.quantise import quantised
from vggt_cache.errors import CommitError, OutOfMemoryError, SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.precompute.write import FeatureWriter, Outgoing, all_finite
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.worker import Worker

LONG_S = 30.0
"""Longer than anything here takes: who waits so long waits for ever."""
DTYPES = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Writing:
    """A writer into a store in `folder`, and what it has told: features written, blocks done, features refused."""

    def __init__(
        self, folder: Path, *, spec: FeatureSpec = SPEC, fs: FileSystem | None = None, records: int = 1
    ):
        self.folder, self.spec = folder, spec
        self.store_dir = create_store(folder, spec)
        self.opened = self.written = 0
        self.done: list[str] = []
        self.on_done: Callable[[str], object] = self.done.append
        self.bad: list[tuple[str, str]] = []
        self._fs = fs or FileSystem()
        self._told = threading.Condition()
        self.writer = FeatureWriter(
            new_shard=self._new_shard,
            feature_dtype=spec.feature_dtype,
            shard_bytes=records * make_feature(0, spec).nbytes,
            on_written=self._on_written,
            on_bad_feature=lambda label, reason: self.bad.append((label, reason)),
        )

    def _new_shard(self) -> ShardWriter:
        self.opened += 1
        return ShardWriter(self.store_dir, self.spec, fs=self._fs)

    def _on_written(self, count: int) -> None:
        with self._told:
            self.written += count
            self._told.notify_all()

    def put(self, *numbers: int) -> None:
        features = torch.stack([make_feature(number, self.spec) for number in numbers])
        self.writer.put([make_key(number) for number in numbers], [f"frame {n}" for n in numbers], features)

    def finish(self, name: str) -> None:
        self.writer.when_committed(lambda: self.on_done(name))

    def has_written(self, count: int, *, within_s: float = LONG_S) -> bool:
        with self._told:
            return self._told.wait_for(lambda: self.written >= count, within_s)

    def holds(self, *numbers: int) -> bool:
        with FeatureCache.open(self.folder, use_index=False) as cache:
            return holds(cache, numbers)


@pytest.fixture(autouse=True)
def all_threads_end() -> Iterator[None]:
    with no_descriptor_leaks():
        yield
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"feature-writer", "shard-committer"}


def comes_true(condition: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + LONG_S
    while not (found := condition()) and time.monotonic() < until_s:
        time.sleep(0.001)
    return found


class Gate:
    """A file system whose nth call of one operation waits until the gate is opened."""

    def __init__(self, operation: str, *, nth: int = 0) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self._operation, self._before = operation, nth
        self.fs = TracedFileSystem(self._fault)

    def _fault(self, name: str, position: int, call: Call) -> Any:
        if name == self._operation:
            self._before -= 1
            if self._before == -1:
                self.reached.set()
                assert self.opened.wait(LONG_S)
        return call()


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("feature_dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found_wherever_it_stands(feature_dtype: str, value: float) -> None:
    feature = make_feature(1, make_spec(feature_dtype=feature_dtype), h=3, w=7).repeat(1, 1, 5)
    count = feature.numel()
    features = feature.expand(count + 1, *feature.shape).contiguous()
    features.view(count + 1, count)[:count].fill_diagonal_(value)
    assert all_finite(features).tolist() == [False] * count + [True]


@pytest.mark.parametrize("feature_dtype", DTYPES)
def test_every_pattern_of_bits_is_told_from_those_that_are_finite(feature_dtype: str) -> None:
    """All of 16 bits; of 32 those that begin with them."""
    wide = DTYPES[feature_dtype] == torch.int32
    bits = torch.arange(1 << 16, dtype=torch.int64) << (16 if wide else 0)
    values = bits.to(DTYPES[feature_dtype]).view(getattr(torch, feature_dtype))
    features = torch.zeros(len(values), 1, 1, 3, dtype=values.dtype)
    features[:, 0, 0, 1] = values
    assert torch.equal(all_finite(features), values.isfinite())


@pytest.mark.parametrize("feature_dtype", DTYPES)
def test_the_largest_numbers_are_finite_although_their_sum_is_not(feature_dtype: str) -> None:
    dtype = getattr(torch, feature_dtype)
    features = torch.full((2, 4, 4, 64), torch.finfo(dtype).max, dtype=dtype)
    features[1] = -features[1]
    assert all_finite(features).all()


@pytest.mark.parametrize("spec", [SPEC, INT8], ids=["bfloat16", "int8"])
def test_a_feature_that_is_not_finite_is_reported_and_the_others_are_stored(
    tmp_path: Path, spec: FeatureSpec
) -> None:
    writing = Writing(tmp_path, spec=spec, records=8)
    features = torch.stack([make_feature(number, spec) for number in (1, 2, 3)])
    features[1, 0, 0, 0] = float("inf")
    writing.writer.put([make_key(number) for number in (1, 2, 3)], ["one", "two", "three"], features)
    writing.writer.close()
    assert writing.bad == [("two", "its feature is not finite in bfloat16, so it is not stored")]
    assert (writing.written, writing.writer.committed) == (2, 2)
    with FeatureCache.open(tmp_path) as cache:
        assert sorted(cache.keys()) == sorted([make_key(1), make_key(3)])
        assert all(equal(cache.get_by_key(make_key(n)), given_back(n, spec)) for n in (1, 3))


@pytest.mark.parametrize("feature_dtype", [*DTYPES, "int8"])
def test_what_is_done_to_a_batch_on_its_device_waits_for_no_value(feature_dtype: str) -> None:
    """A tensor on `meta` has none: whatever looks at one raises."""
    dtype = torch.bfloat16 if feature_dtype == "int8" else getattr(torch, feature_dtype)
    batch = Outgoing([b""] * 2, [""] * 2, torch.empty(2, 3, 4, 8, dtype=dtype, device="meta"), feature_dtype)
    assert (batch.stored.is_meta, batch.finite.is_meta, batch.finite.shape) == (True, True, (2,))
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(quantised(torch.empty(12, 8, dtype=torch.bfloat16, device="meta"))[1])


def test_float16_is_not_packed_as_if_it_were_bfloat16(tmp_path: Path) -> None:
    writing = Writing(tmp_path, spec=INT8)
    with pytest.raises(SettingsError, match=r"features of torch\.float16 are not packed in int8"):
        writing.writer.put([make_key(1)], ["one"], make_feature(1).half()[None])
    writing.writer.close()


@needs_gpu
@pytest.mark.parametrize("spec", [SPEC, INT8], ids=["bfloat16", "int8"])
def test_what_comes_from_a_gpu_is_what_would_come_from_a_cpu(spec: FeatureSpec) -> None:
    features = torch.stack([make_feature(number, spec, h=9, w=13) for number in range(5)])
    features[3, 2, 1, 0] = float("nan")
    on_device = features.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = Outgoing([b""] * 5, [""] * 5, on_device, spec.feature_dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host, finite = batch.on_host()
    expected, flags = Outgoing([b""] * 5, [""] * 5, features, spec.feature_dtype).on_host()
    assert finite == flags == [True, True, True, False, True]
    assert all(equal(host[at], expected[at]) for at in (0, 1, 2, 4))


# ---------------------------------------------------------------- what waits for what


@pytest.mark.parametrize("operation", ["fsync", "link", "fsync_directory"])
def test_a_disk_that_takes_its_time_with_a_shard_does_not_stop_the_writing_of_the_next(
    tmp_path: Path, operation: str
) -> None:
    gate = Gate(operation)
    writing = Writing(tmp_path, fs=gate.fs)
    writing.put(1)
    assert gate.reached.wait(LONG_S)
    writing.put(2, 3)
    assert writing.has_written(3)
    assert writing.writer.committed == 0
    gate.opened.set()
    writing.writer.close()
    assert writing.holds(1, 2, 3)
    assert writing.writer.committed == 3


def test_at_most_three_shards_are_under_way_however_slow_the_disk(tmp_path: Path) -> None:
    gate = Gate("fsync")
    writing = Writing(tmp_path, fs=gate.fs)
    feeder = threading.Thread(target=lambda: [writing.put(number) for number in range(12)])
    feeder.start()
    assert writing.has_written(3)
    assert not writing.has_written(4, within_s=0.3)
    assert writing.opened == 3
    gate.opened.set()
    feeder.join(LONG_S)
    writing.writer.close()
    assert writing.holds(*range(12))


def test_a_block_is_done_when_all_of_its_features_are_in_committed_shards(tmp_path: Path) -> None:
    """Of blocks that share shards, and one that spans three of them."""
    writing = Writing(tmp_path, records=2)
    blocks = {"first": (1, 2, 3), "second": (4,), "third": (5, 6, 7, 8, 9), "empty": ()}
    missing: list[str] = []

    def on_done(name: str) -> None:
        with FeatureCache.open(tmp_path, use_index=False) as cache:
            missing.extend(name for number in blocks[name] if make_key(number) not in cache)
        writing.done.append(name)

    writing.on_done = on_done
    for name, numbers in blocks.items():
        for number in numbers:
            writing.put(number)
        writing.finish(name)
    writing.writer.close()
    assert writing.done == list(blocks)
    assert missing == []
    assert writing.holds(*range(1, 10))


def test_flush_returns_when_all_is_on_disk_and_every_block_is_done(tmp_path: Path) -> None:
    gate = Gate("fsync")
    writing = Writing(tmp_path, fs=gate.fs, records=100)
    writing.put(1)
    writing.finish("first")
    flushed: list[tuple[bool, list[str]]] = []

    def flush() -> None:
        writing.writer.flush()
        flushed.append((gate.opened.is_set(), list(writing.done)))

    thread = threading.Thread(target=flush)
    thread.start()
    assert gate.reached.wait(LONG_S)
    assert (flushed, writing.done) == ([], [])
    gate.opened.set()
    thread.join(LONG_S)
    assert flushed == [(True, ["first"])]
    writing.put(2)
    writing.writer.close()
    assert writing.holds(1, 2)


# ---------------------------------------------------------------- errors


def until_refused(writing: Writing) -> None:
    for number in range(1000, 3000):
        writing.put(number)


@pytest.mark.parametrize(
    "call",
    [until_refused, lambda writing: writing.writer.flush(), lambda writing: writing.writer.close()],
    ids=["put", "flush", "close"],
)
def test_a_failed_commit_is_told_to_whoever_calls_next(
    tmp_path: Path, call: Callable[[Writing], None]
) -> None:
    writing = Writing(tmp_path, fs=failing("fsync", errno.ENOSPC, nth=1), records=2)
    writing.put(1, 2)
    writing.finish("on disk")
    writing.put(3, 4)
    writing.finish("lost")
    with pytest.raises(CommitError, match="the disk is full"):
        call(writing)
    with pytest.raises(CommitError, match="the disk is full"):
        writing.writer.close()
    assert writing.holds(1, 2)
    assert "lost" not in writing.done
    assert writing.writer.committed == 2
    assert temp_files(tmp_path) == []


def test_nothing_is_committed_behind_a_shard_that_could_not_be(tmp_path: Path) -> None:
    """A block that ends in the later shard may have features in the one that is lost."""
    failed = threading.Event()

    def fault(name: str, position: int, call: Call) -> Any:
        if name == "fsync" and not failed.is_set():
            assert writing.has_written(3)  # three shards are full, two of them behind this one
            failed.set()
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call()

    writing = Writing(tmp_path, fs=TracedFileSystem(fault))
    for number in (1, 2, 3):
        writing.put(number)
    writing.finish("block")
    with pytest.raises(CommitError):
        writing.writer.close()
    assert (writing.done, writing.writer.committed) == ([], 0)
    assert writing.holds()
    assert temp_files(tmp_path) == []


def test_what_waits_to_be_committed_is_so_although_the_next_feature_cannot_be_written(tmp_path: Path) -> None:
    full = threading.Event()

    def fault(name: str, position: int, call: Call) -> Any:
        if name == "fsync":
            assert full.wait(LONG_S)
        if name == "pwrite" and threading.current_thread().name == "feature-writer" and writing.written == 2:
            full.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call()

    writing = Writing(tmp_path, fs=TracedFileSystem(fault))
    writing.put(1)
    writing.finish("first")
    writing.put(2)
    writing.put(3)
    writing.finish("third")
    with pytest.raises(CommitError, match="the disk is full"):
        writing.writer.close()
    assert writing.holds(1, 2)
    assert (writing.done, writing.writer.committed) == (["first"], 2)
    assert temp_files(tmp_path) == []


def test_a_shard_that_is_open_when_a_commit_fails_leaves_nothing(tmp_path: Path) -> None:
    gate = Gate("fsync")
    writing = Writing(tmp_path, fs=gate.fs, records=2)

    def on_done(name: str) -> None:
        raise CommitError("the digests cannot be noted")

    writing.on_done = on_done
    writing.put(1)
    writing.finish("block")
    writing.put(2)
    writing.put(3)
    assert writing.has_written(3)
    gate.opened.set()
    assert comes_true(lambda: writing.writer._committing.error is not None)
    with pytest.raises(CommitError, match="digests"):
        writing.writer.close()
    assert writing.holds(1, 2)
    assert temp_files(tmp_path) == []


@pytest.mark.parametrize("operation", ["pwrite", "fsync"])
def test_nobody_waits_for_a_thread_that_has_met_an_error(tmp_path: Path, operation: str) -> None:
    """Neither who feeds the writer, whose places are all taken by then, nor the writer who feeds the committer."""
    taken = threading.Event()

    def fault(name: str, position: int, call: Call) -> Any:
        if name == operation:
            assert taken.wait(LONG_S)
            raise MemoryError
        return call()

    writing = Writing(tmp_path, fs=TracedFileSystem(fault))
    raised: list[BaseException] = []

    def feed() -> None:
        try:
            until_refused(writing)
        except MemoryError as error:
            raised.append(error)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    assert comes_true(writing.writer._writing._jobs.full)
    taken.set()
    feeder.join(LONG_S)
    assert len(raised) == 1
    with pytest.raises(MemoryError):
        writing.writer.close()


def test_a_thread_ends_although_the_word_to_end_was_lost_and_does_what_came_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The queue may run out of memory when it has given the word out already."""
    real, done = queue.Queue.get, []

    def get(self: queue.Queue[Any], *arguments: Any, **options: Any) -> Any:
        job = real(self, *arguments, **options)
        if job is None:
            raise MemoryError
        return job

    monkeypatch.setattr(queue.Queue, "get", get)
    worker = Worker("feature-writer", waiting=1)
    for number in range(3):
        worker.submit(partial(done.append, number))
    worker.close()
    worker.close()
    assert done == [0, 1, 2]
    assert isinstance(worker.error, MemoryError)


def test_an_error_in_saying_that_blocks_are_done_ends_the_writing(tmp_path: Path) -> None:
    writing = Writing(tmp_path)

    def on_done(name: str) -> None:
        raise CommitError("the digests cannot be noted")

    writing.on_done = on_done
    writing.finish("block")
    writing.put(1)
    with pytest.raises(CommitError, match="digests"):
        until_refused(writing)
    with pytest.raises(CommitError, match="digests"):
        writing.writer.close()
    assert writing.holds(1)
    assert temp_files(tmp_path) == []


@pytest.mark.parametrize("where", ["the check", "the copy"])
def test_out_of_memory_on_the_way_to_the_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    place = "Outgoing" if where == "the check" else "Outgoing.on_host"
    monkeypatch.setattr(f"vggt_cache.precompute.write.{place}", full)
    writing = Writing(tmp_path)
    with pytest.raises(OutOfMemoryError, match=r"^no memory is left for the features .* --batch_size"):
        until_refused(writing)
    monkeypatch.undo()
    if where == "the check":
        writing.writer.close()
    else:
        with pytest.raises(OutOfMemoryError):
            writing.writer.close()

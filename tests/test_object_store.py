"""A cache in a bucket keeps the promises of one in a directory, with one request for a record."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.store import S3Store

from bucket_kit import SECRET, Proxy, Request
from store_kit import SPEC, equal, holds, make_feature, make_key, make_spec, write_shard
from vggt_cache import Staging
from vggt_cache.cli import main
from vggt_cache.doctor import examine
from vggt_cache.errors import (
    CacheAccessError,
    CacheNotFoundError,
    CommitError,
    DataError,
    SettingsError,
    StoreError,
    VggtCacheError,
)
from vggt_cache.inspection import draw_view
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.report import Reporter, standing_failures
from vggt_cache.samples.sources import sources_of
from vggt_cache.store import FeatureCache, convert, describe, list_stores, prune, remove_store
from vggt_cache.store.bucket import Bucket
from vggt_cache.store.object_folder import ObjectFolder
from vggt_cache.store.shards import PIECE_BYTES


def opened(bucket: str, **options: Any) -> FeatureCache:
    return FeatureCache.open(bucket, spec=SPEC, **options)


def keys_in(bucket: str) -> list[str]:
    """All that lies in the bucket, whoever asks."""
    store = S3Store(bucket.split("/")[2], client_options={"allow_http": True})
    return sorted(found["path"] for found in obstore.list(store).collect())


def once(status: int | str, wanted: Callable[[Request], bool], *, times: int = 1) -> Any:
    """A fault of the first `times` requests that are wanted."""
    left = [times]

    def fault(request: Request) -> int | str | None:
        if not wanted(request) or not left[0]:
            return None
        left[0] -= 1
        return status

    return fault


def is_shard_put(request: Request) -> bool:
    return request.kind == "PUT" and request.path.endswith(".safetensors")


# ---------------------------------------------------------------- the promises


def test_features_come_back_bit_by_bit_and_a_snapshot_stays_until_it_is_refreshed(bucket: str) -> None:
    with pytest.raises(CacheNotFoundError, match="there is no directory s3://"):
        opened(bucket)
    write_shard(bucket, [1, 2])
    with opened(bucket) as cache:
        assert holds(cache, [1, 2])
        assert cache.get_by_key(make_key(9)) is None
        write_shard(bucket, [3])
        assert holds(cache, [1, 2])
        cache.refresh()
        assert holds(cache, [1, 2, 3])
        assert cache.save_index()
        copied = pickle.loads(pickle.dumps(cache))  # noqa: S301
        with opened(bucket) as indexed, copied as copy:
            assert holds(indexed, [1, 2, 3])
            assert indexed.unindexed_shards == ()
            assert holds(copy, [1, 2, 3])
            assert copy.snapshot == cache.snapshot
    assert list_stores(bucket + "/") == [SPEC]
    assert describe(bucket).stores[0].entries == 3


def test_what_is_staged_costs_no_request(bucket: str, s3: Proxy, tmp_path: Path) -> None:
    write_shard(bucket, range(5))
    write_shard(bucket, range(5, 8))
    assert main(["stage", bucket, str(tmp_path / "ahead"), "--context", "frame"]) == 0
    for name, requests in (("ahead", 0), ("through", 8), ("through", 0)):
        with opened(bucket, stage=Staging(local_dir=tmp_path / name)) as cache:
            s3.requests.clear()
            assert holds(cache, range(8))
            assert s3.kinds() == requests * ["GET"]
    with FeatureCache.open(tmp_path / "through", spec=SPEC) as local:
        assert holds(local, range(8))


def test_a_record_costs_one_request_however_large(bucket: str, s3: Proxy) -> None:
    spec = make_spec(embed_dim=PIECE_BYTES // 16)
    feature = make_feature(1, spec)
    assert feature.nbytes > PIECE_BYTES
    for shard in range(3):
        write_shard(bucket, {4 * shard + n: feature for n in range(2)}, spec)
    with FeatureCache.open(bucket, spec=spec) as cache:
        s3.requests.clear()
        for key in cache:
            assert equal(cache.get_by_key(key), feature)
        assert s3.kinds() == 6 * ["GET"]


def test_a_packed_record_costs_one_request_too(bucket: str, s3: Proxy) -> None:
    write_shard(bucket, [1, 2], codec="lossless")
    with opened(bucket) as cache:
        s3.requests.clear()
        assert holds(cache, [1, 2])
        assert s3.kinds() == 2 * ["GET"]


def test_opening_with_an_index_reads_no_shard(bucket: str, s3: Proxy) -> None:
    for number in range(4):
        write_shard(bucket, [number])
    with opened(bucket) as cache:
        cache.save_index()
    s3.requests.clear()
    with opened(bucket) as cache:
        assert len(cache) == 4
    assert not [request for request in s3.requests if request.path.endswith(".safetensors")]


def test_upkeep_loses_nothing_and_a_reader_of_a_removed_shard_is_told(bucket: str) -> None:
    write_shard(bucket, [1, 2])
    write_shard(bucket, [1, 2, 3])
    with opened(bucket) as cache:
        assert [action.reason for action in prune(bucket, dry_run=False)] == [
            "later shards hold all of its records, intact"
        ]
        assert holds(cache, [1, 2, 3])  # served from the newer one
        assert [done.problem for done in convert(bucket, SPEC, "lossless", dry_run=False)] == [""]
        with pytest.raises(StoreError, match="no longer there, although this process has seen it"):
            cache.get_by_key(make_key(1))
        cache.refresh()
        assert holds(cache, [1, 2, 3])
    assert describe(bucket).stores[0].codecs == {"lossless": 1}
    assert remove_store(bucket, SPEC, dry_run=False)
    assert keys_in(bucket) == []


def test_damage_in_a_bucket_is_found_and_mended(bucket: str) -> None:
    name = write_shard(bucket, [1, 2])
    store = S3Store(bucket.split("/")[2], client_options={"allow_http": True})
    path = f"some/cache/{SPEC.short_name}/shards/{name}"
    data = bytearray(bytes(obstore.get(store, path).bytes()))
    data[-1] ^= 1
    obstore.put(store, path, bytes(data))
    with opened(bucket) as cache:
        good = {key: cache.verify_record(key) for key in cache if key == make_key(1)}
        assert good == {make_key(1): True}
        with pytest.raises(StoreError, match="does not match its checksum"):
            cache.verify_record(make_key(2))
    assert prune(bucket, damaged=True, dry_run=False)
    with opened(bucket) as cache:
        assert holds(cache, [1])


# ---------------------------------------------------------------- writers that meet, fail and die


def test_of_racing_writers_all_commit_and_one_of_them_gets_a_claim(bucket: str) -> None:
    at_once = threading.Barrier(8)

    def write(writer: int) -> tuple[str, bool]:
        at_once.wait()
        won = ObjectFolder(f"{bucket}/claims").create("block.0", bytes([writer]) * 32)
        return write_shard(bucket, [1, 10 + writer]), won

    with ThreadPoolExecutor(8) as pool:
        names, won = zip(*pool.map(write, range(8)), strict=True)
    assert sum(won) == 1
    with opened(bucket) as cache:
        assert holds(cache, [1, *range(10, 18)])
        assert set(cache.shard_names()) == set(names)
        assert cache.shard_of(make_key(1)) == max(names)


_WRITE = """
import sys, store_kit
store_kit.write_shard(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])))
print("committed", flush=True)
"""
_WRITE_ZEROS = """
import sys
from vggt_cache.store import ShardWriter
from vggt_cache.store.header import parse_spec
with ShardWriter(sys.argv[1], parse_spec(sys.argv[2])) as writer:
    writer.append_payload(bytes(16), 2, 3, memoryview(bytes(2 * 3 * 4 * 2)))
    writer.commit()
print("committed", flush=True)
"""


def writer_process(bucket: str, first: int, last: int) -> subprocess.Popen[str]:
    return started(_WRITE, bucket, str(first), str(last))


def started(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_writer_killed_in_mid_upload_leaves_nothing(bucket: str, s3: Proxy) -> None:
    write_shard(bucket, [1])
    before = keys_in(bucket)
    s3.fault = once("stalled", is_shard_put)
    process = started(_WRITE_ZEROS, f"{bucket}/{SPEC.short_name}", SPEC.to_json())
    assert s3.stalled.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    assert process.communicate()[0] == ""
    assert keys_in(bucket) == before
    with opened(bucket) as cache:
        assert holds(cache, [1])
    assert prune(bucket, dry_run=False) == []


@pytest.mark.slow
def test_a_process_that_is_killed_at_any_request_leaves_whole_shards_alone(bucket: str, s3: Proxy) -> None:
    write_shard(bucket, [0])
    done = {0}
    for at in range(1, 9):
        begun, numbers = len(s3.requests), range(10 * at, 10 * at + 10)
        process = writer_process(bucket, numbers.start, numbers.stop)
        while process.poll() is None and len(s3.requests) - begun < at:
            time.sleep(0.002)
        process.kill()
        if "committed" in process.communicate()[0]:
            done.update(numbers)
        with opened(bucket) as cache:
            there = [number for number in (0, *range(10, 90)) if make_key(number) in cache]
            assert done <= set(there)
            assert holds(cache, there)


@pytest.mark.slow
def test_of_racing_processes_none_loses_a_feature(bucket: str) -> None:
    processes = [writer_process(bucket, 10 * n, 10 * n + 15) for n in range(8)]
    assert [process.communicate()[0] for process in processes] == 8 * ["committed\n"]
    with opened(bucket) as cache:
        assert holds(cache, range(85))


def test_what_the_service_fails_to_do_for_a_while_is_asked_again(bucket: str, s3: Proxy) -> None:
    s3.fault = once(503, lambda request: request.kind == "PUT", times=2)
    write_shard(bucket, [1])
    s3.fault = once(500, lambda request: request.kind in ("GET", "LIST", "HEAD"), times=3)
    with opened(bucket) as cache:
        assert holds(cache, [1])


def test_an_answer_that_ends_in_the_middle_is_asked_for_again(bucket: str, s3: Proxy) -> None:
    spec = make_spec(embed_dim=1024)
    write_shard(bucket, [1], spec)
    with FeatureCache.open(bucket, spec=spec) as cache:
        s3.fault = once("cut", lambda request: request.kind == "GET")
        s3.requests.clear()
        assert equal(cache.get_by_key(make_key(1)), make_feature(1, spec))
        assert s3.kinds() == 2 * ["GET"]


@pytest.mark.parametrize("fault", ["lost", 500])
def test_an_upload_whose_answer_is_lost_is_still_one_shard(bucket: str, s3: Proxy, fault: str | int) -> None:
    s3.fault = once(fault, is_shard_put)
    write_shard(bucket, [1])
    with opened(bucket) as cache:
        assert holds(cache, [1])
        assert len(cache.shard_names()) == 1


def test_a_service_that_goes_on_failing_is_one_sentence_and_what_was_committed_stays(
    bucket: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VGGT_CACHE_CLOUD_RETRY_S", "0.2")
    write_shard(bucket, [1])
    with opened(bucket) as cache:
        s3.fault = lambda request: 503
        with pytest.raises(CacheAccessError, match="asks for fewer requests, HTTP status 503") as refused:
            cache.get_by_key(make_key(1))
        assert "\n" not in str(refused.value)
        with pytest.raises(CommitError, match=r"HTTP status 503.*what was committed before is untouched"):
            write_shard(bucket, [2])
        s3.fault = lambda request: 403 if request.kind == "PUT" else None
        with pytest.raises(CommitError, match="the credentials do not allow this"):
            write_shard(bucket, [2])
        s3.fault = lambda request: None
        cache.refresh()
        assert holds(cache, [1])


def test_no_message_and_no_object_has_the_credentials(
    bucket: str, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(bucket, [1])
    told = []

    def attempt(*statuses: int) -> None:
        for status in statuses:
            s3.fault = lambda request, status=status: status
            for step in (lambda: opened(bucket), lambda: write_shard(bucket, [2]), lambda: describe(bucket)):
                with pytest.raises(VggtCacheError) as refused:
                    step()
                told.append("".join(traceback.format_exception(refused.value)))

    attempt(400, 403, 404)
    for url in (
        f"s3://someone:{SECRET}@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"s3://b#{SECRET}",
    ):
        with pytest.raises(SettingsError) as refused:
            FeatureCache.open(url, spec=SPEC)
        told.append("".join(traceback.format_exception(refused.value)))
    s3.fault = lambda request: None
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("VGGT_CACHE_CLOUD_RETRY_S", "0.2")
    with pytest.raises(CacheAccessError, match="cannot be reached") as refused:
        FeatureCache.open("s3://nowhere/x", spec=SPEC)
    told.append("".join(traceback.format_exception(refused.value)))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3.port}")
    store = S3Store(bucket.split("/")[2], client_options={"allow_http": True})
    told += [bytes(obstore.get(store, key).bytes()).decode("latin1") for key in keys_in(bucket)]
    assert not [text for text in told if SECRET in text or "AKIA" in text]


# ---------------------------------------------------------------- forks


def test_a_forked_process_is_told_and_does_not_hang(bucket: str) -> None:
    write_shard(bucket, [1])
    with opened(bucket) as cache:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()

        def ask() -> None:
            for step in (lambda: cache.get_by_key(make_key(1)), lambda: opened(bucket)):
                try:
                    step()
                except CacheAccessError as error:
                    theirs.send(str(error))
            cache.close()

        process = context.Process(target=ask)
        process.start()
        for _ in range(2):
            assert ours.poll(30)
            assert "was forked from one that has used a bucket" in ours.recv()
        process.join(30)
        assert process.exitcode == 0
        assert holds(cache, [1])


# ---------------------------------------------------------------- small files


def test_what_processes_append_is_read_by_all_in_parts(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggt_cache.store.object_folder.PART_BYTES", 100)
    one, other = DigestTable(bucket), DigestTable(bucket)
    rows = [(bytes([n]) * 16, bytes([n]) * 32) for n in range(6)]
    for row in rows[:4]:
        one.append([row])
    assert len(other.reload())
    other.append(rows[4:])
    assert len(one.reload())
    assert not len(one.reload())
    for table in (one, other, DigestTable(bucket)):
        table.reload()
        assert [table.find(key) for key, _ in rows] == [value for _, value in rows]
    assert len(keys_in(bucket)) > 2  # parts


def test_small_files_brought_from_a_disk_are_read_and_go_on(bucket: str) -> None:
    place, key = Bucket("/".join(bucket.split("/")[:3])), "some/cache/failures.jsonl"
    place.put(key, b'{"path": "old.png", "reason": "is torn", "of": "data"}\n')
    reporter = Reporter()
    reporter.list_failures(bucket, "data")
    assert reporter.earlier_failures() == ["old.png"]
    reporter.mended(["old.png"])
    reporter.failed("new.png", "is empty")
    assert standing_failures(bucket) == {("data", "new.png"): "is empty"}


def test_failures_of_all_processes_stand_in_one_list(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vggt_cache.store.object_folder.PART_MS", 0)
    reporters = [Reporter(), Reporter()]
    for number, reporter in enumerate(reporters):
        reporter.list_failures(bucket, "data")
        reporter.failed(f"{number}.png", "is torn")
    assert standing_failures(bucket) == {("data", "0.png"): "is torn", ("data", "1.png"): "is torn"}
    reporters[0].mended(["1.png"])
    assert standing_failures(bucket) == {("data", "0.png"): "is torn"}


def test_a_dead_owner_is_succeeded_and_a_living_one_is_not(bucket: str) -> None:
    now = [0.0]
    clock = lambda: now[0]  # noqa: E731
    block = "ab" * 16
    with (
        Claims(f"{bucket}/claims", clock_s=clock, ttl_s=60) as one,
        Claims(f"{bucket}/claims", clock_s=clock, ttl_s=60) as other,
    ):
        assert one.try_claim(block)
        for _ in range(3):
            assert not other.try_claim(block)
            now[0] += 40
            one.beat()
        assert not other.try_claim(block)
        now[0] += 70
        assert other.try_claim(block)
    assert keys_in(bucket) == []


# ---------------------------------------------------------------- what is refused, and what doctor finds


@pytest.mark.parametrize(
    "url", ["http://host/x", "s3://", "s3:/bucket/x", "s3://bucket/../x", "s3://bucket/a//b"]
)
def test_what_is_no_place_in_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="give"):
        FeatureCache.open(url, spec=SPEC)


def test_data_and_pictures_stay_on_this_machine() -> None:
    with pytest.raises(DataError, match=r"--data_root s3://\.\.\. lies in a bucket, and only a cache can"):
        sources_of("s3://bucket/data", None, None)
    with pytest.raises(SettingsError, match=r"--output s3://\.\.\. lies in a bucket"):
        draw_view("cache", "data", "s3://bucket/x.png", count=1, context=None, fingerprint=None)


def test_without_the_package_a_bucket_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(SettingsError, match=r"pip install 'vggt-feature-cache\[cloud\]'"):
        FeatureCache.open("s3://without/package", spec=SPEC)


def test_a_put_of_what_is_there_already_is_told_from_ones_own(bucket: str) -> None:
    place = Bucket("/".join(bucket.split("/")[:3]))
    place.put_new("one", b"content")
    place.put_new("one", b"content")  # as a repeated request
    with pytest.raises(FileExistsError):
        place.put_new("one", b"another")


def test_doctor_says_what_a_bucket_honours(bucket: str, s3: Proxy) -> None:
    found = {finding.name: finding.status for finding in examine(bucket)}
    assert set(found.values()) == {"ok"}
    assert {"create if absent", "listed after a put", "part of an object"} <= set(found)
    assert keys_in(bucket) == []
    s3.fault = lambda request: 403 if request.kind == "PUT" else None
    assert {"writable": "warn"}.items() <= {
        finding.name: finding.status for finding in examine(bucket)
    }.items()

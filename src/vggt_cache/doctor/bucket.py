"""Examines a place in a bucket: does the service honour what a cache relies on, and how fast is it from here?

Objects are made below a folder of a name that nothing else has, and removed again.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from vggt_cache.doctor import trials
from vggt_cache.doctor.findings import Finding, finding, reason
from vggt_cache.place import address_of
from vggt_cache.store.bucket import Bucket
from vggt_cache.store.filesystem import accessing

_CREATORS = 8
_SPEED_BYTES = 16 << 20
_ASKED = 5


def examine_bucket(url: str) -> list[Finding]:
    """All findings about a URL. Raises CacheAccessError where the bucket cannot be read, and SettingsError."""
    address = address_of(url)
    bucket = Bucket(f"{address.scheme}://{address.bucket}")
    folder = f"{address.key}/.doctor-{secrets.token_hex(8)}".lstrip("/")
    with accessing(url):
        bucket.has_any(address.key)
    try:
        bucket.put(f"{folder}/first", b"first")
    except OSError as error:
        return [finding("writable", "warn", f"no ({reason(error)})")]
    findings = [finding("writable", "ok", "yes")]
    try:
        findings += _honoured(bucket, folder)
    except OSError as error:
        findings.append(finding("bucket", "fail", reason(error), case="any: refused"))
    return findings + _removed(bucket, folder)


def _honoured(bucket: Bucket, folder: str) -> Iterator[Finding]:
    yield _create_if_absent(bucket, f"{folder}/contested")
    listed = {meta["path"] for meta in bucket.list_all(folder)}
    yield _verdict("listed after a put", {f"{folder}/first", f"{folder}/contested"} <= listed)
    bucket.put(f"{folder}/first", b"second")
    yield _verdict("contents replaced", bucket.get_whole(f"{folder}/first", 100) == b"second")
    data = secrets.token_bytes(_SPEED_BYTES)
    began_s = time.perf_counter()
    bucket.put(f"{folder}/large", data)
    yield trials.speed("write speed", _SPEED_BYTES, time.perf_counter() - began_s, "for one writer")
    began_s = time.perf_counter()
    whole = b"".join(bucket.get(f"{folder}/large", at, 4 << 20) for at in range(0, _SPEED_BYTES, 4 << 20))
    took_s = time.perf_counter() - began_s
    yield _verdict("part of an object", whole == data)
    yield trials.speed("read speed", _SPEED_BYTES, took_s, "for one reader")
    seconds = []
    for _ in range(_ASKED):
        began_s = time.perf_counter()
        bucket.get(f"{folder}/large", 0, 1)
        seconds.append(time.perf_counter() - began_s)
    yield finding("answer", "ok", f"{statistics.median(seconds) * 1000:.1f} ms")


def _create_if_absent(bucket: Bucket, key: str) -> Finding:
    """Several threads make one object at the same moment, each with other content: one of them must succeed."""

    def create(number: int) -> bool:
        with suppress(FileExistsError):
            bucket.put_new(key, bytes([number]))
            return True
        return False

    try:
        with ThreadPoolExecutor(_CREATORS) as pool:
            made = sum(pool.map(create, range(_CREATORS)))
    except OSError as error:
        return finding("create if absent", "fail", reason(error), case="create if absent: refused")
    return finding("create if absent", "ok" if made == 1 else "warn", f"{made} of {_CREATORS}")


def _verdict(name: str, is_right: bool) -> Finding:
    return finding(name, "ok" if is_right else "fail", "yes" if is_right else "no")


def _removed(bucket: Bucket, folder: str) -> list[Finding]:
    with suppress(OSError):
        for meta in bucket.list_all(folder):
            bucket.delete(meta["path"])
        if not bucket.has_any(folder):
            return []
    return [finding("cleaning up", "warn", f"{bucket.root}/{folder}")]

"""What a single process relies on when it keeps a cache: the store itself commits a shard here and reads it again."""

from __future__ import annotations

import math
import os
import random
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vggt_cache.doctor.findings import Finding
from vggt_cache.doctor.place import FEATURE_BYTES
from vggt_cache.errors import CommitError, VggtCacheError
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FileSystem

CLOCK_TOLERANCE_S = 2.0
THROUGHPUT_BYTES = 64 << 20
NAME_BYTES = 128
"""Longest file name that a cache may use."""
_RECORDS = 16
_PATCH_BYTES = 4096
SPEC = FeatureSpec(
    encoder=EncoderSpec(
        weights_digest="00" * 32, embed_dim=_PATCH_BYTES // 4, depth=1, num_heads=1, img_size=518, patch_size=14,
        patch_embed="none", layer=0, compute_dtype="float32",
    ),
    preprocessing=Preprocessing(),
)  # fmt: skip
"""Of features that nobody computed: bfloat16, 4096 bytes a patch."""


def _noted(name: str) -> Any:
    """A call of the operating system that leaves a note of itself."""

    def call(self: WatchedSystem, *arguments: Any, **named: Any) -> Any:
        self.began_at_s[name] = time.monotonic()
        try:
            result = getattr(FileSystem, name)(self, *arguments, **named)
        except OSError as error:
            self.refused[name] = error.strerror or str(error)
            raise
        self.took_s[name] = time.monotonic() - self.began_at_s[name]
        if name == "create_file":
            self.mode = stat.S_IMODE(os.fstat(result).st_mode)
        return result

    return call


class WatchedSystem(FileSystem):
    """The operating system as the store uses it, with notes of the calls that a mount may not do well."""

    def __init__(self) -> None:
        self.began_at_s: dict[str, float] = {}
        """When each was last called, by time.monotonic()."""
        self.took_s: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self.mode: int | None = None
        """Permissions of the latest new file."""

    create_file = _noted("create_file")
    fsync = _noted("fsync")
    fsync_directory = _noted("fsync_directory")
    set_mode = _noted("set_mode")
    try_lock = _noted("try_lock")
    link = _noted("link")


def commit_shard(cache_dir: Path, fs: FileSystem, payloads: list[bytes]) -> Path:
    """Commit features of these bytes, under their numbers as keys; returns the shard. Raises CommitError."""
    from vggt_cache.store import ShardWriter, create_store

    store = create_store(cache_dir, SPEC, fs=fs)
    side = math.isqrt(len(payloads[0]) // _PATCH_BYTES)
    with ShardWriter(store, SPEC, max_records=len(payloads), fs=fs) as writer:
        for number, payload in enumerate(payloads):
            writer.append_payload(number.to_bytes(16, "big"), side, side, memoryview(payload))
        return store / "shards" / writer.commit()


def tried_commit(folder: Path) -> Iterator[Finding]:
    """What the store met when it committed a shard and read it back."""
    free = os.statvfs(folder)
    is_roomy = free.f_bavail * free.f_frsize >= 4 * THROUGHPUT_BYTES
    block = random.Random(0).randbytes((THROUGHPUT_BYTES // _RECORDS if is_roomy else _PATCH_BYTES) - 1)
    payloads = [bytes([number]) + block for number in range(_RECORDS)]
    fs, reason, shard = WatchedSystem(), "", None
    began_s = time.perf_counter()
    try:
        shard = commit_shard(folder, fs, payloads)
    except CommitError as error:
        reason = str(error)
    took_s = time.perf_counter() - began_s
    yield from _met(fs)
    if shard is None and "fsync" not in fs.refused:
        yield Finding("commit", "fail", "refused", f"The store cannot write a shard here: {reason}.")
    meaning = "There is too little free space for a test file, or it could not be written."
    read = None if shard is None else _read_back(folder, shard, payloads)
    if shard is None or not is_roomy:
        yield Finding("write speed", "warn", "not measured", meaning)
    else:
        yield _speed("write speed", took_s, "for all writers, fsync included")
    if read is None or (read.status == "ok" and not is_roomy):
        yield Finding("read speed", "warn", "not measured", meaning)
    else:
        yield read


def _met(fs: WatchedSystem) -> Iterator[Finding]:
    accepted = "Works; each commit waits that long."
    for name, call, status, lost in (
        ("fsync of a file", "fsync", "fail", "a committed shard"),
        ("fsync of a directory", "fsync_directory", "warn", "the name of a committed shard"),
    ):
        if call in fs.refused:
            meaning = f"After a power failure {lost} could be lost."
            yield Finding(name, status, f"refused ({fs.refused[call]})", meaning)
        elif call in fs.took_s:
            yield Finding(name, "ok", f"{fs.took_s[call] * 1000:.1f} ms", accepted)
    for name, call, without, meaning in (
        ("hard links", "link", "A shard is renamed instead; copying a cache with cp -l will not work here.",
         "A shard gets its name by one, which can take no other file's place."),
        ("file locks", "try_lock", "prune cannot see that a writer lives, and goes by the age of its file.",
         "prune sees by one that a writer lives."),
        ("file modes", "set_mode", "Shards stay writable: nothing but care protects them from being changed.",
         "Shards are made read-only."),
    ):  # fmt: skip
        if call in fs.refused:
            yield Finding(name, "warn", f"no ({fs.refused[call]})", without)
        elif call in fs.took_s:
            yield Finding(name, "ok", "yes", meaning)
    if fs.mode is not None:
        shared = bool(fs.mode & 0o040)
        private = (
            "Only you can read the cache that you write: for a shared one, run umask 027 before precompute."
        )
        meaning = "Members of the group can read the cache that you write." if shared else private
        yield Finding("new files", "ok" if shared else "warn", f"{fs.mode:04o}", meaning)


def _read_back(cache_dir: Path, shard: Path, payloads: list[bytes]) -> Finding:
    import torch

    from vggt_cache.store import FeatureCache

    if hasattr(os, "posix_fadvise"):
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    came_back: list[bool] = []
    with suppress(VggtCacheError), FeatureCache.open(cache_dir, spec=SPEC) as cache:
        began_s = time.perf_counter()
        features = [cache.get_by_key(number.to_bytes(16, "big")) for number in reversed(range(len(payloads)))]
        took_s = time.perf_counter() - began_s
        came_back = [
            feature is not None and feature.flatten().view(torch.uint8).numpy().tobytes() == payload
            for feature, payload in zip(features, reversed(payloads), strict=True)
        ]
    if not came_back or not all(came_back):
        meaning = "What is read is not what was written, so nothing can be kept here: have the disk checked."
        return Finding("read speed", "fail", "wrong bytes", meaning)
    return _speed("read speed", took_s, "with their checksums (partly from memory)")


def _speed(name: str, took_s: float, how: str) -> Finding:
    rate = THROUGHPUT_BYTES / took_s
    return Finding(
        name,
        "ok",
        f"{rate / 1e6:,.0f} MB/s",
        f"That is {rate / FEATURE_BYTES:,.0f} features of 4.2 MB a second {how}.",
    )


def clock(folder: Path) -> Finding:
    """Difference between the file system's clock and this machine's, and whether touching a file moves its time."""
    path = folder / "clock"
    before = time.time()
    path.write_bytes(b"")
    stamped = path.stat().st_mtime
    offset_s = stamped - (before + time.time()) / 2
    time.sleep(0.05)
    os.utime(path)
    if path.stat().st_mtime <= stamped:
        meaning = (
            "Touching a file does not move its time within 50 ms, so that a dead process is noticed late."
        )
        return Finding("clock", "warn", "does not advance", meaning)
    if abs(offset_s) > CLOCK_TOLERANCE_S:
        meaning = (
            "The file system's clock and this machine's differ, so that images written lately are read again "
            "when planning: let both use NTP."
        )
        return Finding("clock", "warn", f"{offset_s:+.1f} s", meaning)
    meaning = "The file system's clock agrees with this machine's."
    return Finding("clock", "ok", f"{offset_s * 1000:+.0f} ms", meaning)


def long_name(folder: Path) -> Finding:
    """Whether names of the length that a cache may use are possible."""
    try:
        (folder / ("n" * NAME_BYTES)).write_bytes(b"")
    except OSError as error:
        meaning = "Names of shards may be that long: use another file system."
        return Finding("file names", "fail", f"under {NAME_BYTES} bytes ({error.strerror or error})", meaning)
    longest = os.pathconf(folder, "PC_NAME_MAX")
    return Finding("file names", "ok", f"{longest} bytes", f"A cache uses names of up to {NAME_BYTES} bytes.")

"""What a cache relies on, tried out: the store commits and reads a shard, alone and with a second process beside it."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vggt_cache import store
from vggt_cache.doctor.findings import Finding, finding, reason
from vggt_cache.errors import CacheAccessError, CommitError, VggtCacheError
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.precompute.claims import Claims

SPAWN = multiprocessing.get_context("spawn")
FEATURE_BYTES = 4.24e6
"""A feature of VGGT-1B in bfloat16 at 518 x 392 pixels."""
VISIBILITY_TIMEOUT_S = 10.0
SLOW_VISIBILITY_S = 1.0
CLOCK_TOLERANCE_S = 2.0
THROUGHPUT_BYTES = 64 << 20
NAME_BYTES = 128
"""Longest file name that a cache may use."""
_ANSWER_TIMEOUT_S = 60.0
_SWAP_S = 0.25
_BLOCKS = 50
_RECORDS = 16
_CONTENTS = {"old": b"a" * 65536, "new": b"b" * 65536, "last": b"c" * 65536}
_PATCH_BYTES = 4096
SPEC = FeatureSpec(
    encoder=EncoderSpec(
        weights_digest="00" * 32, embed_dim=_PATCH_BYTES // 4, depth=1, num_heads=1, img_size=518, patch_size=14,
        patch_embed="none", layer=0, compute_dtype="float32",
    ),
    preprocessing=Preprocessing(),
)  # fmt: skip
"""Of features that nobody computed: bfloat16, 4096 bytes a patch."""

_CALLS = {
    "fsync": "fsync of a file", "fsync_directory": "fsync of a directory", "link": "hard links",
    "try_lock": "file locks", "set_mode": "file modes",
}  # fmt: skip
"""Of the operating system, that a mount may not do well, and what the finding is called."""


class Partner:
    """Raises OSError where the process cannot be started, fails, or does not answer."""

    def __enter__(self) -> Partner:
        self._pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def ask(self, do: Callable[..., Iterator[Any]], *arguments: Any) -> Any:
        """Begin with one of this module's generators, whose values are the answers; returns the first."""
        self._pipe.send((do, arguments))
        return self.answer()

    def answer(self) -> Any:
        """The next answer."""
        answer: Any = OSError("it does not answer")
        try:
            if self._pipe.poll(_ANSWER_TIMEOUT_S):
                answer = self._pipe.recv()
        except EOFError:
            answer = OSError("it has died")
        if isinstance(answer, Exception):
            raise OSError(f"the second process: {reason(answer)}")
        return answer


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, which ends this one
    with suppress(EOFError):
        while True:
            do, arguments = pipe.recv()
            try:
                for answer in do(*arguments):
                    pipe.send(answer)
            except (OSError, CacheAccessError) as error:
                pipe.send(error)


def watch(look: Callable[[Path], str], path: Path, awaited: str, timeout_s: float) -> Iterator[Any]:
    """`ready`; then when (time.monotonic()) the awaited was seen, None if it never was, and how often what was seen."""
    yield "ready"
    seen: Counter[str] = Counter()
    until_s = time.monotonic() + timeout_s
    while not seen[awaited] and time.monotonic() < until_s:
        seen[look(path)] += 1
    yield time.monotonic() if seen[awaited] else None, seen


def shard_in(folder: Path) -> str:
    time.sleep(0.0005)  # or it would take time from the process that it waits for
    return "there" if any(name.endswith(".safetensors") for name in os.listdir(folder)) else "absent"


def content_of(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return "absent"
    return next((name for name, content in _CONTENTS.items() if content == data), "torn")


def _compete(folder: Path, blocks: list[str]) -> Iterator[Any]:
    """When the race for the blocks begins (time.monotonic()), then those that this process has won."""
    claims = Claims(folder)  # given back by nobody: a block that was free again would be won twice
    start_at_s = time.monotonic() + 0.05
    yield start_at_s
    yield _won(claims, blocks, start_at_s)


def _won(claims: Claims, blocks: list[str], start_at_s: float) -> list[str]:
    while time.monotonic() < start_at_s:
        pass
    return [block for block in blocks if claims.try_claim(block)]


class WatchedSystem(store.FileSystem):
    """The operating system as the store uses it, with notes of the calls that a mount may not do well."""

    def __init__(self) -> None:
        self.began_at_s: dict[str, float] = {}
        """When each was last called, by time.monotonic()."""
        self.answers: dict[str, float | str] = {}
        """The seconds that it took, or why it was refused."""
        for name in _CALLS:
            setattr(self, name, partial(self._note, name, getattr(self, name)))

    def _note(self, name: str, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        self.began_at_s[name] = time.monotonic()
        try:
            result = call(*arguments, **named)
        except OSError as error:
            self.answers[name] = reason(error)
            raise
        self.answers[name] = time.monotonic() - self.began_at_s[name]
        return result


def commit_shard(cache_dir: Path, fs: store.FileSystem, payloads: list[bytes]) -> Path:
    """Commit features of these bytes, under their numbers as keys; returns the shard. Raises CommitError."""
    home = Path(store.create_store(cache_dir, SPEC, fs=fs))
    side = math.isqrt(len(payloads[0]) // _PATCH_BYTES)
    with store.ShardWriter(home, SPEC, max_records=len(payloads), fs=fs) as writer:
        for number, payload in enumerate(payloads):
            writer.append_payload(number.to_bytes(16, "big"), side, side, memoryview(payload))
        return home / "shards" / writer.commit()


def _read_back(cache_dir: Path, shard: Path, payloads: list[bytes]) -> float | None:
    """Seconds that reading took; None where other bytes came back."""
    import torch

    with open(shard, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with suppress(VggtCacheError), store.FeatureCache.open(cache_dir, spec=SPEC) as cache:
        began_s = time.perf_counter()
        features = [cache.get_by_key(number.to_bytes(16, "big")) for number in reversed(range(len(payloads)))]
        took_s = time.perf_counter() - began_s
        if all(
            feature is not None and feature.flatten().view(torch.uint8).numpy().tobytes() == payload
            for feature, payload in zip(features, reversed(payloads), strict=True)
        ):
            return took_s
    return None


def commit(folder: Path) -> Iterator[Finding]:
    """What the store met when it committed a shard and read it back."""
    free = os.statvfs(folder)
    is_roomy = free.f_bavail * free.f_frsize >= 4 * THROUGHPUT_BYTES
    block = random.Random(0).randbytes((THROUGHPUT_BYTES // _RECORDS if is_roomy else _PATCH_BYTES) - 1)
    payloads = [bytes([number]) + block for number in range(_RECORDS)]
    fs, shard, refusal = WatchedSystem(), None, None
    began_s = time.perf_counter()
    try:
        shard = commit_shard(folder, fs, payloads)
    except CommitError as error:
        refusal = error
    written_s: float | None = time.perf_counter() - began_s
    yield from _met(fs.answers)
    (folder / "new").touch()
    mode = stat.S_IMODE((folder / "new").stat().st_mode)
    yield finding("new files", "ok" if mode & 0o040 else "warn", f"{mode:04o}")
    if refusal and not isinstance(fs.answers.get("fsync"), str):
        yield finding("commit", "fail", "refused", error=refusal)
    is_measured = shard is not None and is_roomy
    written_s = written_s if is_measured else None
    yield speed("write speed", THROUGHPUT_BYTES, written_s, "for all writers, fsync included")
    read_s = _read_back(folder, shard, payloads) if shard else None
    if shard and read_s is None:
        yield finding("read speed", "fail", "wrong bytes")
    else:
        how = "with their checksums (partly from memory)"
        yield speed("read speed", THROUGHPUT_BYTES, read_s if is_measured else None, how)


def _met(answers: dict[str, float | str]) -> Iterator[Finding]:
    for call, name in _CALLS.items():
        answer, is_sync = answers.get(call), call.startswith("fsync")
        if isinstance(answer, str):
            status = "fail" if call == "fsync" else "warn"
            yield finding(name, status, f"{'refused' if is_sync else 'no'} ({answer})")
        elif answer is not None:
            yield finding(name, "ok", f"{answer * 1000:.1f} ms" if is_sync else "yes")


def speed(name: str, size_bytes: int, took_s: float | None, how: str) -> Finding:
    if took_s is None:
        return finding(name, "warn", "not measured", case="speed: unknown")
    rate = size_bytes / took_s
    features = rate / FEATURE_BYTES
    return finding(name, "ok", f"{rate / 1e6:,.0f} MB/s", case="speed: known", features=features, how=how)


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
        return finding("clock", "warn", "does not advance", case="clock: still")
    if abs(offset_s) > CLOCK_TOLERANCE_S:
        return finding("clock", "warn", f"{offset_s:+.1f} s")
    return finding("clock", "ok", f"{offset_s * 1000:+.0f} ms")


def file_names(folder: Path) -> Finding:
    """Whether names of the length that a cache may use are possible."""
    try:
        (folder / ("n" * NAME_BYTES)).touch()
    except OSError as error:
        return finding("file names", "fail", f"under {NAME_BYTES} bytes ({reason(error)})")
    return finding("file names", "ok", f"{os.pathconf(folder, 'PC_NAME_MAX')} bytes", limit=NAME_BYTES)


ALONE = (commit, clock, file_names)


def exclusive_create(folder: Path, partner: Partner) -> Finding:
    """Two processes claim the same blocks at the same moment: each must be won exactly once."""
    blocks = [f"{number:032x}" for number in range(_BLOCKS)]
    start_at_s = partner.ask(_compete, folder, blocks)
    with Claims(folder) as claims:
        winners = [*_won(claims, blocks, start_at_s), *partner.answer()]
    if sorted(winners) == blocks:
        return finding("exclusive create", "ok", f"{_BLOCKS} of {_BLOCKS}")
    won = len(set(winners))
    return finding("exclusive create", "fail", f"{won} won, {len(winners) - won} twice")


def atomic_rename(folder: Path, partner: Partner) -> Iterator[Finding]:
    """While one process replaces a file, as the index is, the other must find a whole one, and the last one soon."""
    path, temporary = folder / "replaced", folder / "replaced.tmp"
    path.write_bytes(_CONTENTS["old"])
    partner.ask(watch, content_of, path, "last", VISIBILITY_TIMEOUT_S)
    until_s, swaps = time.monotonic() + _SWAP_S, 0
    while time.monotonic() < until_s:
        swaps += 1
        temporary.write_bytes(_CONTENTS["new" if swaps % 2 else "old"])
        os.replace(temporary, path)
    temporary.write_bytes(_CONTENTS["last"])
    renamed_at_s = time.monotonic()
    os.replace(temporary, path)
    seen_at_s, seen = partner.answer()
    value = f"{swaps} swaps, {seen['old'] + seen['new']} reads"
    faults = f", {seen['absent']} absent, {seen['torn']} torn" if seen["absent"] or seen["torn"] else ""
    yield finding("atomic rename", "fail" if faults else "ok", value + faults)
    yield _visible("new contents visible", renamed_at_s, seen_at_s)


def new_name_visible(folder: Path, partner: Partner) -> Finding:
    """How soon another process lists a shard that was committed."""
    shards, fs = folder / SPEC.short_name / "shards", WatchedSystem()
    shards.mkdir(parents=True)
    partner.ask(watch, shard_in, shards, "there", VISIBILITY_TIMEOUT_S)
    commit_shard(folder, fs, [bytes(_PATCH_BYTES)])
    seen_at_s, _ = partner.answer()
    return _visible("new name visible", fs.began_at_s["link"], seen_at_s)


def _visible(name: str, done_at_s: float, seen_at_s: float | None) -> Finding:
    if seen_at_s is None:
        return finding(name, "fail", f"not within {VISIBILITY_TIMEOUT_S:.0f} s", case="visible: never")
    status = "warn" if seen_at_s - done_at_s > SLOW_VISIBILITY_S else "ok"
    return finding(name, status, f"{(seen_at_s - done_at_s) * 1000:.1f} ms", case="visible: soon")


TOGETHER = (exclusive_create, atomic_rename, new_name_visible)

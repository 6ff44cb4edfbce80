"""Killing a real process at every operation, and at every system call, of a commit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from store_kit import SPEC, Call, TracedFileSystem, equal, make_feature, make_key, save_index, write_shard
from test_store_processes import finish
from trials.registry import Unavailable
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter
from vggt_cache.store.filesystem import OPERATING_SYSTEM

OLD, NEW = (1, 2), (2, 3)
"""Numbers that were committed before, and those of the commit that is killed."""
NAMES = "openat,getdents64,link,linkat,unlink,unlinkat,rename,renameat"
WATCHED = f"{NAMES},fstat,newfstatat,flock,pwrite64,fchmod,fsync,close"
ATTEMPTS = 30
"""strace may miss the first calls of a process that it has just attached to; the process then ends unharmed."""
_FEATURES = [make_feature(number) for number in range(4)]


def commit_new(folder: Path, fs: FileSystem = OPERATING_SYSTEM) -> None:
    with ShardWriter(folder / SPEC.short_name, SPEC, max_records=4, fs=fs) as writer:
        for number in NEW:
            writer.append(make_key(number), _FEATURES[number])
        writer.commit()


def check_after_kill(folder: Path) -> None:
    """The old shard is whole; the new one is whole or not there; and a commit succeeds."""
    for use_index in (True, False):
        with FeatureCache.open(folder, use_index=use_index) as cache:
            assert cache.damaged_shards == ()
            assert set(cache) in ({make_key(n) for n in OLD}, {make_key(n) for n in (*OLD, *NEW)})
            assert all(equal(cache.get_by_key(key), _feature(key)) for key in cache)
    commit_new(folder)
    with FeatureCache.open(folder) as cache:
        assert set(cache) == {make_key(n) for n in (*OLD, *NEW)}
        assert all(equal(cache.get_by_key(key), _feature(key)) for key in cache)


def _feature(key: bytes) -> Any:
    return next(_FEATURES[number] for number in range(4) if make_key(number) == key)


def _forked(body: Callable[[], None]) -> int:
    process = os.fork()
    if process == 0:
        status = 1
        try:
            body()
            status = 0
        finally:
            os._exit(status)
    return process


# ---------------------------------------------------------------- operations of the store


def kill_at_every_operation(seed: int, folder: Path) -> int:
    """SIGKILL before or after each operation of the seam."""
    traced = TracedFileSystem()
    commit_new(_new_store(folder / "traced"), traced)
    for position in range(len(traced.operations)):
        for when in ("before", "after"):
            store = _new_store(folder / f"{position}-{when}")
            process = _forked(partial(commit_new, store, _killing(position, when)))
            assert finish(process) == -signal.SIGKILL
            check_after_kill(store)
    return 2 * len(traced.operations)


def _new_store(folder: Path) -> Path:
    write_shard(folder, {number: _FEATURES[number] for number in OLD}, max_records=4)
    save_index(folder)
    return folder


def _killing(position: int, when: str) -> TracedFileSystem:
    def fault(name: str, at: int, call: Call) -> Any:
        if at == position and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = call()
        if at == position:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return TracedFileSystem(fault)


# ---------------------------------------------------------------- system calls


def kill_at_every_system_call(seed: int, folder: Path) -> int:
    """SIGKILL as the kernel enters each system call on files that a commit makes, by strace."""
    if shutil.which("strace") is None:
        raise Unavailable("strace is not installed")
    calls = _calls_of_a_commit(_new_store(folder / "traced"), folder / "trace")
    for position, call in enumerate(calls):
        inject = f"inject={call[0]}:signal=KILL:when={call[1]}"
        for attempt in range(ATTEMPTS):
            store = _new_store(folder / f"{position}-{attempt}")
            status = _under_strace(store, folder / "trace", inject)
            check_after_kill(store)
            if status == -signal.SIGKILL:
                break
        else:
            raise Unavailable(f"strace did not kill at {call}")
    return len(calls)


def _calls_of_a_commit(store: Path, trace: Path) -> list[tuple[str, int]]:
    """Each call's name, and the how manieth of that name it is."""
    assert _under_strace(store, trace) == 0
    names = re.findall(r"^(?:\d+ +)?(\w+)\(", trace.read_text(), re.MULTILINE)
    seen: Counter[str] = Counter()
    calls = []
    for name in names:
        seen[name] += 1
        calls.append((name, seen[name]))
    assert {"fsync", "pwrite64"} <= set(names), names
    return calls


def _under_strace(store: Path, trace: Path, *inject: str) -> int:
    """Exit status of a process that commits under strace, which is attached when it is about to begin."""
    reading, writing = os.pipe()

    def body() -> None:
        os.close(writing)
        os.read(reading, 1)
        commit_new(store)

    process = _forked(body)
    os.close(reading)
    options = [part for text in (f"trace={WATCHED}", *inject) for part in ("-e", text)]
    strace = subprocess.Popen(
        ["strace", "-o", str(trace), *options, "-p", str(process)], stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_until_attached(process, strace)
    finally:
        os.close(writing)
    status = finish(process)
    strace.communicate()
    return status


def _wait_until_attached(process: int, strace: subprocess.Popen[str]) -> None:
    for _ in range(2000):
        if f"TracerPid:\t{strace.pid}" in Path(f"/proc/{process}/status").read_text():
            time.sleep(0.005)  # attached; the options take effect with the next stop
            return
        if strace.poll() is not None:
            raise Unavailable(
                f"strace cannot attach: {(strace.stderr.read() if strace.stderr else '').strip()}"
            )
        time.sleep(0.001)
    raise Unavailable("strace did not attach")

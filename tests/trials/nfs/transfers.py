"""Reading and writing over the mount by hand, in the ways between which the store has the choice; jobs of a client."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from vggt_cache.store.shards import PIECE_BYTES

RAW = Path("/mnt/cache/raw")
RECORD_BYTES, CHUNK_BYTES = 6 * 2**20, 4 * 2**20
READING = ("pieces", "pieces_random", "whole", "whole_random", "direct", "mapped")
"""As the store reads; with POSIX_FADV_RANDOM; a record in one call; with it; around the page cache; by page faults."""
WRITING = ("late", "dontneed", "sync_file_range")
"""All in fsync; the store's hint for local disks after every 4 MiB; the call that does that and no more."""
_SYNC_FILE_RANGE_WRITE = 2


def read(way: str, threads: int, records: int, wanted: int, seed: int) -> dict[str, float]:
    """Records by chance, none of which is in memory: seconds, and bytes from the server over bytes wanted."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    chosen = Random(seed).sample(range(records), wanted)
    before, began_s = _server_bytes(), time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda part: _read_records(way, chosen[part::threads]), range(threads)))
    seconds = time.perf_counter() - began_s
    return {"seconds": seconds, "fetched": (_server_bytes()[0] - before[0]) / (wanted * RECORD_BYTES)}


def _read_records(way: str, numbers: list[int]) -> None:
    descriptor = os.open(RAW, os.O_RDONLY | (os.O_DIRECT if way == "direct" else 0))
    if way.endswith("random"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    buffer = memoryview(mmap.mmap(-1, RECORD_BYTES))
    step = PIECE_BYTES if way.startswith("pieces") else RECORD_BYTES
    for number in numbers:
        if way == "mapped":
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapped:
                start = number * RECORD_BYTES
                buffer[:] = mapped[start : start + RECORD_BYTES]
            continue
        for at in range(0, RECORD_BYTES, step):
            done = 0
            while done < step:
                done += os.preadv(
                    descriptor, [buffer[at + done : at + step]], number * RECORD_BYTES + at + done
                )
    os.close(descriptor)


def write(way: str, chunks: int, pause_s: float) -> dict[str, float]:
    """A file of 4 MiB chunks, each of which takes so long to be made; seconds in all, and those in fsync."""
    path = RAW.with_name(f"written-{os.getpid()}")
    chunk, before, began_s = os.urandom(CHUNK_BYTES), _server_bytes(), time.perf_counter()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    for number in range(chunks):
        time.sleep(pause_s)
        done = 0
        while done < CHUNK_BYTES:
            done += os.pwrite(descriptor, chunk[done:], number * CHUNK_BYTES + done)
        _hint(way, descriptor, number * CHUNK_BYTES)
    synced_s = time.perf_counter()
    os.fsync(descriptor)
    ended_s = time.perf_counter()
    os.close(descriptor)
    path.unlink()
    sent = (_server_bytes()[1] - before[1]) / (chunks * CHUNK_BYTES)
    return {"seconds": ended_s - began_s, "fsync_s": ended_s - synced_s, "sent": sent}


def _hint(way: str, descriptor: int, offset: int) -> None:
    if way == "dontneed":
        os.posix_fadvise(descriptor, offset, CHUNK_BYTES, os.POSIX_FADV_DONTNEED)
    elif way == "sync_file_range":
        length = ctypes.c_int64(CHUNK_BYTES)
        done = ctypes.CDLL(None, use_errno=True).sync_file_range(
            descriptor, ctypes.c_int64(offset), length, _SYNC_FILE_RANGE_WRITE
        )
        assert done == 0, os.strerror(ctypes.get_errno())


def _server_bytes() -> tuple[int, int]:
    """Bytes read from and written to the server since it was mounted."""
    of_mount: list[str] = []
    for line in Path("/proc/self/mountstats").read_text().splitlines():
        words: list[Any] = line.split()
        if "/mnt/cache" in words:
            of_mount = []
        if words[:1] == ["bytes:"]:
            of_mount = words
    return int(of_mount[5]), int(of_mount[6])

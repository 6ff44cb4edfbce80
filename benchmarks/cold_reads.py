"""What is read from one cold device, and how fast: for `bench_cold.py`, whose docstring says why."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from slow_disk import bytes_from_disks, drop_pages, join, read_ahead_bytes
from slow_mount import Wire
from vggt_cache.delivery import THREADS, ReadAhead
from vggt_cache.store import FeatureCache
from vggt_cache.store.shards import PIECE_BYTES

PIECES = {"small": 256 * 1024, "product": PIECE_BYTES}
"""Bytes of a record that are read and hashed at a time."""
LONG_BYTES = 4 * 2**20
"""A read that is long enough for any device."""
PRIMER, PRIMING_S = "primer", 0.25
"""A file of the device that is read before the clock starts, and for how long."""
WANTED_SHARE = 4
"""One of so many features is wanted at a time: its neighbours in the shard are not, as in a large cache."""
SLACK = 1.25
"""Length of a step of the loop, over what the device needs for the batch."""
WINDOW_BYTES, STEP_BYTES = 2 * 2**20, 128 * 1024
"""How far the kernel is asked to fetch beyond the piece that is read; it takes little at a time."""
ADVICE = ("plain", "random", "window")
"""No hint; no read-ahead (POSIX_FADV_RANDOM); and with it the record's next bytes asked for (POSIX_FADV_WILLNEED)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """Where a store lies that was written by `bench_cold.py`."""

    folder: Path
    group: Path | None = None
    """The control group that slows the disk."""
    wire: Wire | None = None
    """What lies before a mount."""

    def fetched_bytes(self) -> int:
        """Bytes that this process, or the mount, has fetched from the device so far."""
        return bytes_from_disks() if self.wire is None else self.wire.passed_bytes()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is read, in which portions."""

    grid: tuple[int, int]
    batch_size: int
    seconds: float
    """About how long one pass takes on the device."""
    rounds: int
    threads: tuple[int, ...] = (1, 2, 4, 8)


class ColdReads:
    """One device. Each way is told which records to read (numbers); nothing of them is in page cache."""

    def __init__(self, device: Device, plan: Plan) -> None:
        self.device, self.plan = device, plan
        self.caches = {
            io: FeatureCache.open(device.folder / "cache", context="frame", io=io)
            for io in ("buffered", "direct")
        }
        self.cache = self.caches["buffered"]
        self.record_bytes = 2 * plan.grid[0] * plan.grid[1] * self.cache.spec.encoder.channels
        self.stored = len(self.cache)
        self.raw = os.open(device.folder / "raw", os.O_RDONLY)
        self.count = 2 * plan.batch_size
        per_s = self.timed(self.sequential)[0]
        batches = int(per_s * plan.seconds / (plan.batch_size * self.record_bytes))
        most = self.stored // WANTED_SHARE // plan.batch_size
        self.count = plan.batch_size * max(2, min(batches, most))

    def timed(self, way: Callable[[Sequence[int]], None]) -> tuple[float, float, float]:
        """Bytes per second, bytes fetched over bytes wanted, and a processor's seconds for each 10^9 bytes."""
        wanted = self._cold()
        fetched, cpu_s, began_s = self.device.fetched_bytes(), time.process_time(), time.perf_counter()
        way(wanted)
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        size = self.record_bytes * len(wanted)
        return size / seconds, (self.device.fetched_bytes() - fetched) / size, cpu_s / (size / 1e9)

    def _cold(self) -> list[int]:
        """What to read next. A throttle that was idle lets the bytes of 0.1 s pass at once: they are used up."""
        drop_pages(self.device.folder)
        ends_s = time.perf_counter() + PRIMING_S
        buffer = memoryview(bytearray(LONG_BYTES))
        with open(self.device.folder / PRIMER, "rb", buffering=0) as file:
            while time.perf_counter() < ends_s and file.readinto(buffer):
                pass
        return random.sample(range(self.stored), self.count)

    # ------------------------------------------------------------ ways

    def sequential(self, wanted: Sequence[int]) -> None:
        """As much as is wanted, one long read after the other; each thread has a part of its own."""
        part_bytes = len(wanted) * self.record_bytes // THREADS

        def read(part: int) -> None:
            buffer = memoryview(bytearray(LONG_BYTES))
            for at in range(0, part_bytes, LONG_BYTES):
                os.preadv(self.raw, [buffer[: part_bytes - at]], part * part_bytes + at)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, range(THREADS)))

    def delivery(self, threads: int = THREADS, *, io: str = "buffered") -> Callable[[Sequence[int]], None]:
        """As the training loop takes them, without a step between."""

        def deliver(wanted: Sequence[int]) -> None:
            for _ in self._batches(wanted, threads, ahead=True, io=io):
                pass

        return deliver

    def pieces(
        self, piece_bytes: int, advice: str, threads: int = THREADS
    ) -> Callable[[Sequence[int]], None]:
        """Plain reads of the same records, with a checksum."""

        def read(numbers: Sequence[int]) -> None:
            descriptor = os.open(self.device.folder / "raw", os.O_RDONLY)
            buffer = memoryview(bytearray(self.record_bytes))
            if advice != "plain":
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for number in numbers:
                offset, hasher = number * self.record_bytes, xxhash.xxh3_128()
                for at in range(0, self.record_bytes, piece_bytes):
                    piece = buffer[at : at + piece_bytes]
                    if advice == "window":
                        self._ask_for(descriptor, offset, at, piece_bytes)
                    os.preadv(descriptor, [piece], offset + at)
                    hasher.update(piece)
            os.close(descriptor)

        def work(wanted: Sequence[int]) -> None:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, [wanted[part::threads] for part in range(threads)]))

        return work

    def _ask_for(self, descriptor: int, offset: int, at: int, piece_bytes: int) -> None:
        """Of the record at `offset`: at its first piece the whole window, then what each piece moves it on by."""
        window_bytes = max(WINDOW_BYTES, piece_bytes)
        begin = at + window_bytes - piece_bytes if at else 0
        for step in range(begin, min(at + window_bytes, self.record_bytes), STEP_BYTES):
            size = min(STEP_BYTES, self.record_bytes - step)
            os.posix_fadvise(descriptor, offset + step, size, os.POSIX_FADV_WILLNEED)

    def _batches(
        self, wanted: Sequence[int], threads: int, *, ahead: bool, io: str = "buffered"
    ) -> Iterator[None]:
        """Yields where a batch has arrived; it may be used until the next one is asked for."""
        reader = ReadAhead(self.caches[io], torch.device("cpu"), threads=threads)
        size = self.plan.batch_size
        batches = [wanted[at : at + size] for at in range(0, len(wanted), size)]

        def announced(numbers: Sequence[int]) -> list[Any]:
            return [reader.start(number.to_bytes(16, "big")) for number in numbers]

        upcoming = announced(batches[0])
        for following in [*batches[1:], []]:
            reads, upcoming = upcoming, announced(following) if ahead else []
            reader.settle(reads)
            for read in reads:
                assert reader.wait(read) is not None
            yield
            for read in reads:
                reader.release(read)
            if not ahead:
                upcoming = announced(following)
        reader.close()

    def seconds_per_step(self, step_s: float, *, ahead: bool) -> float:
        """Of a loop whose steps take `step_s` by themselves. The first batch, which nothing can hide, is left out."""
        wanted = self._cold()
        batches = self._batches(wanted, THREADS, ahead=ahead)
        next(batches)
        steps, began_s = 0, time.perf_counter()
        time.sleep(step_s)
        for _ in batches:
            steps += 1
            time.sleep(step_s)
        return (time.perf_counter() - began_s - step_s) / steps

    def checksum_s_per_gb(self) -> float:
        """Of a record that lies in memory."""
        record, times = bytes(self.record_bytes), 20
        began_s = time.process_time()
        for _ in range(times):
            xxhash.xxh3_128(record)
        return (time.process_time() - began_s) / (times * self.record_bytes / 1e9)

    # ------------------------------------------------------------ all of it

    def ways(self) -> dict[str, Callable[[Sequence[int]], None]]:
        ways = {"sequential": self.sequential}
        ways |= {f"delivery_{threads}": self.delivery(threads) for threads in self.plan.threads}
        ways |= {f"past_{threads}": self.delivery(threads, io="direct") for threads in self.plan.threads}
        for name, size in PIECES.items():
            ways |= {f"{name}_pieces_{advice}": self.pieces(size, advice) for advice in ADVICE}
        return ways

    def run(self) -> dict[str, Any]:
        """The middle of all rounds; each round has an order of its own."""
        found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in self.ways()}
        for _ in range(self.plan.rounds):
            for way, work in self.ways().items():
                found[way].append(self.timed(work))
        speeds, fetched, cpu = (
            {way: statistics.median(run[number] for run in runs) for way, runs in found.items()}
            for number in range(3)
        )
        delivery = speeds[f"delivery_{THREADS}"]
        return {
            "records": self.count,
            "record_bytes": self.record_bytes,
            "read_ahead_bytes": read_ahead_bytes(self.device.folder),
            "bytes_per_s": speeds,
            "fetched_over_wanted": fetched,
            "cpu_s_per_gb": cpu,
            "checksum_s_per_gb": self.checksum_s_per_gb(),
            "delivery_over_device": delivery / speeds["sequential"],
            "loop": self.loop(speeds["sequential"]),
        }

    def loop(self, device_per_s: float) -> dict[str, float]:
        step_s = SLACK * self.plan.batch_size * self.record_bytes / device_per_s
        ahead_s = self.seconds_per_step(step_s, ahead=True)
        when_needed_s = self.seconds_per_step(step_s, ahead=False)
        return {
            "step_s": step_s,
            "ahead_over_step": ahead_s / step_s,
            "when_needed_over_step": when_needed_s / step_s,
        }


def measure(device: Device, plan: Plan) -> dict[str, Any]:
    """In a process of its own: a control group is joined for good."""
    if device.group is not None:
        join(device.group)
    return ColdReads(device, plan).run()

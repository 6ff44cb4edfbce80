"""Processes side by side on one machine, each with a part of its own: for `bench_scaling.py`."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench_precompute import encoder_alone_s
from vggt_cache.encoder import Checkpoint
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import Preprocessing
from vggt_cache.precompute.settings import choose_compute_dtype

LOADED, PROCESSED = "Model loaded successfully", re.compile(r"\[SUCCESS\].* Processed (\d+) images")
DECODED = 32
"""Different frames of the bare encoder, which takes them in turn."""
WAIT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """One process's part of the machine."""

    cores: tuple[int, ...]
    gpu: int | None

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"

    @contextmanager
    def taken(self) -> Iterator[dict[str, str]]:
        """Children that are started meanwhile run here. Yields the environment for those that are commands."""
        threads = str(len(self.cores))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(self.gpu)
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield environment
        finally:
            os.sched_setaffinity(0, before)


def places(count: int, device: str) -> list[Place]:
    """Equal shares of the cores that this process may use, and a GPU each where `device` is cuda."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    return [
        Place(
            cores=tuple(cores[at * share : (at + 1) * share]), gpu=at if device.startswith("cuda") else None
        )
        for at in range(count)
    ]


# ---------------------------------------------------------------- commands that tell how far they are


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one run of precompute has said, and when, in seconds of this process's clock."""

    loaded_s: float
    processed_s: float
    images: int


class Precompute(threading.Thread):
    """One run of precompute; the thread reads its lines as they come."""

    def __init__(self, place: Place, flags: dict[str, object], log: Path) -> None:
        super().__init__()
        command = [sys.executable, "-m", "vggt_cache", "precompute"]
        command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        self._log = log
        with place.taken() as environment, open(log, "w") as stderr:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
        self._loaded_s = self._processed_s = 0.0
        self._images = 0
        self.start()

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if LOADED in line:
                self._loaded_s = time.perf_counter()
            elif match := PROCESSED.match(line):
                self._processed_s, self._images = time.perf_counter(), int(match[1])

    def told(self) -> Told:
        """Waits for the run's end."""
        self.join()
        if self._process.wait() or not self._loaded_s or not self._processed_s:
            raise SystemExit(
                f"precompute failed ({self._process.returncode}): {self._log.read_text()[-2000:]}"
            )
        return Told(loaded_s=self._loaded_s, processed_s=self._processed_s, images=self._images)


# ---------------------------------------------------------------- the bare encoder


@dataclass(frozen=True, kw_only=True)
class BareWork:
    """What the bare encoder does in each process."""

    model: Path
    paths: tuple[Path, ...]
    image_size: int
    batch_size: int
    frames: int


def bare_s(used: Sequence[Place], work: BareWork) -> float:
    """Seconds of the slowest of as many processes as places, which begin together with everything loaded."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(len(used)), context.Queue()
    processes = []
    for place in used:
        with place.taken():
            processes.append(context.Process(target=_encode, args=(place, work, barrier, results)))
            processes[-1].start()
    seconds = [results.get(timeout=WAIT_S) for _ in processes]
    for process in processes:
        process.join()
    return max(seconds)


def _encode(place: Place, work: BareWork, barrier: Any, results: Any) -> None:
    torch.set_num_threads(len(place.cores))
    dtype = choose_compute_dtype("auto", place.device)
    encoder = Checkpoint.open(str(work.model)).load(device=place.device, compute_dtype=dtype)
    preprocessing = Preprocessing(image_size=work.image_size)
    decoded = [
        torch.from_numpy(decode_frame(read_frame(path), preprocessing)) for path in work.paths[:DECODED]
    ]
    pixels = [decoded[at % len(decoded)] for at in range(work.frames)]
    encoder_alone_s(encoder, pixels[: 2 * work.batch_size], work.batch_size)  # the first calls are slower
    barrier.wait(WAIT_S)
    results.put(encoder_alone_s(encoder, pixels, work.batch_size))

"""Frames for precompute to read: noisy PNG files, as large as real photographs, and annotations that name them.

Made by several processes, because compressing one takes 50 ms and holds Python's lock; they load neither torch nor the
encoder.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

_PER_PROCESS = 8
"""So many at least: starting a process takes as long as making a few."""


def write_frames(root: Path, count: int) -> list[Path]:
    """PNG of 640x480 and 500 to 600 KB, each with noise of its own, and `train.jsonl` that names each once."""
    paths = [root / f"{number:05d}.png" for number in range(count)]
    (root / "train.jsonl").write_text("".join(f'{{"images": ["{path.name}"]}}\n' for path in paths))
    processes = min(os.cpu_count() or 1, count // _PER_PROCESS)
    if processes < 2:
        for number, path in enumerate(paths):
            _write_frame(path, number)
        return paths
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_write_frame, paths, range(count), chunksize=_PER_PROCESS))
    return paths


def _write_frame(path: Path, number: int) -> None:
    y, x = np.ogrid[0:480, 0:640]
    phase = (x[..., None] * (np.arange(3) + 1) + 2 * y[..., None] + 40 * number) / 90
    noise = np.random.default_rng(number).integers(-8, 9, (480, 640, 3))
    image = 127 + 100 * np.sin(phase.astype(np.float32)) + noise
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)

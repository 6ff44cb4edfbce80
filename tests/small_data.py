"""Small inputs for end-to-end tests: tiny images, annotations that name them, and the command line run on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vggt_cache.precompute.plan import Plan
from vggt_cache.samples import Problem, find_sources, iter_samples

SIZE = ["--image_size", "56", "--device", "cpu", "--num_workers", "0", "--batch_size", "4"]
"""64x48 frames become a grid of 3 x 4 patches: fast enough to run the real encoder in every test."""


def write_image(path: Path, seed: int, size: tuple[int, int] = (64, 48)) -> Path:
    """A PNG of smooth noise, different for every seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_episode(root: Path, name: str, steps: int, seed: int = 0) -> list[str]:
    """`steps` frames below root/name; returns their names relative to the root."""
    names = [f"{name}/{step:04d}.png" for step in range(steps)]
    for step, frame in enumerate(names):
        write_image(root / frame, seed * 1000 + step)
    return names


def history(step: int, count: int = 9) -> list[int]:
    return list(range(step + 1)) if step < count else np.linspace(0, step, count, dtype=int).tolist()


def write_annotations(path: Path, lists: Sequence[Sequence[str]]) -> Path:
    path.write_text(
        "".join(json.dumps({"images": list(frames), "conversations": []}) + "\n" for frames in lists)
    )
    return path


def write_dataset(root: Path, *, episodes: int = 2, steps: int = 6) -> list[list[str]]:
    """Episodes in JanusVLN's layout; returns every sample's frames."""
    root.mkdir(parents=True, exist_ok=True)
    lists = []
    for episode in range(episodes):
        names = write_episode(root, f"ep{episode}", steps, seed=episode)
        lists += [[names[frame] for frame in history(step)] for step in range(steps)]
    write_annotations(root / "train.jsonl", lists)
    return lists


def plan_of(root: Path, context: str, max_samples: int = -1) -> Plan:
    """The plan of data in which nothing is wrong."""

    def fail(problem: Problem) -> None:
        raise AssertionError(problem)

    sources = find_sources(root)
    return Plan(iter_samples(sources, on_problem=fail), sources.root, context, max_samples)


def command_line(arguments: Sequence[object]) -> list[str]:
    return [sys.executable, "-m", "vggt_cache", *map(str, arguments)]


def start(
    arguments: Sequence[object], *, new_group: bool = False, **environment: str
) -> subprocess.Popen[str]:
    """The real command in a process of its own."""
    return subprocess.Popen(
        command_line(arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=new_group,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )

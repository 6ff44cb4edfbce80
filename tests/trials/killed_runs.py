"""Trials in which whole runs of `precompute` are killed, and run again to the end."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from random import Random
from typing import Any

from trials.small_runs import Scene, small_checkpoint

TRIALS_PER_SEED = 10


def killed_runs(seed: int, folder: Path, *, trials: int = TRIALS_PER_SEED, checkpoint: Any = None) -> int:
    """One cache a trial: runs are killed 1 to 3 times, then one goes to the end. Features are compared bit by bit."""
    random = Random(seed)
    scene = Scene.make(folder, random, checkpoint or small_checkpoint())
    in_the_middle = 0
    for number in range(trials):
        cache_dir = folder / f"cache-{number}"
        while not _kill_one(scene, cache_dir, random):
            shutil.rmtree(cache_dir)  # that run was at its end already: begin anew
        before = scene.check(cache_dir)
        in_the_middle += 0 < len(before) < len(scene.expected)
        for _ in range(random.choice((0, 0, 0, 1, 2))):
            _kill_one(scene, cache_dir, random)
            found = scene.check(cache_dir)
            assert before <= found, "a killed run took features with it"
            before = found
        scene.complete(cache_dir)
    assert in_the_middle or trials < TRIALS_PER_SEED, "all kills came too early or too late to say anything"
    return trials


def _kill_one(scene: Scene, cache_dir: Path, random: Random) -> bool:
    """Start a run and kill it at a random moment; False where it ended before that."""
    workers = ("--num_workers", str(random.choice((0,) * 9 + (1,))))
    with scene.start(cache_dir, *workers, shard_records=random.choice((1, 1, 2))) as child:
        scene.wait_at_random(child, cache_dir, random)
        child.send(signal.SIGKILL)
        status = child.end().status
    assert status in (-signal.SIGKILL, 0), status
    return status != 0

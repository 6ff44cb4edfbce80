"""Trials with runs that stand still and go on, on machines whose clocks are wrong, beside one that does neither."""

from __future__ import annotations

import os
import shutil
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from trials.children import Child
from trials.small_runs import Scene, temporary_shards
from trials.toy_encoder import ToyCheckpoint

TRIALS_PER_SEED = 10
CLAIM_TTL_S = 0.25
_WRONG_BY_S = (0.0, 0.0, -86_400.0, -5.0, 5.0, 86_400.0)


def stopped_runs(seed: int, folder: Path, *, trials: int = TRIALS_PER_SEED) -> int:
    """One cache a trial: two or three runs at once. Features are compared bit by bit, and nobody waits for ever."""
    random = Random(seed)
    scene = Scene.make(folder, random, ToyCheckpoint(pause_s=0.01))
    for number in range(trials):
        cache_dir = folder / f"cache-{number}"
        _one(scene, cache_dir, random)
        shutil.rmtree(cache_dir)
    return trials


def _one(scene: Scene, cache_dir: Path, random: Random) -> None:
    with ExitStack() as stack:
        runs = [
            stack.enter_context(_start(scene, cache_dir, random, number))
            for number in range(random.choice((2, 2, 3)))
        ]
        living = runs.pop(random.randrange(len(runs)))
        for run in runs:
            _wait_at_random(run, cache_dir, scene.seconds, random)
            run.send(signal.SIGSTOP)
        # While the others stand still: it takes their work over, whatever their clocks say of when they stopped.
        assert living.end().status == 0, living.end().said
        assert scene.check(cache_dir) == set(scene.expected), "a run that ended well is incomplete"
        for run in runs:
            run.send(signal.SIGKILL if random.random() < 0.2 else signal.SIGCONT)
        ends = [run.end() for run in runs]
    assert all(end.status in (0, -signal.SIGKILL) for end in ends), ends
    scene.complete(cache_dir)
    if all(end.status == 0 for end in ends):
        assert temporary_shards(cache_dir) == [], "a run that ended well left a temporary file"
        assert list(cache_dir.glob("*/claims/*")) == [], "a run that ended well left a claim"


def _start(scene: Scene, cache_dir: Path, random: Random, number: int) -> Child:
    return scene.start(
        cache_dir,
        shard_records=random.choice((1, 1, 2)),
        prepare=partial(_on_this_machine, random.choice(_WRONG_BY_S)),
        name=f"-{number}",
    )


def _on_this_machine(wrong_by_s: float) -> None:
    """Times that this process asks for and sets are those of its own clock, as on a client of a network disk."""
    os.environ["VGGT_CACHE_CLAIM_TTL_S"] = str(CLAIM_TTL_S)
    clock_s, utime = time.time, os.utime

    def own_utime(path: Any, times: Any = None, **options: Any) -> None:
        now_s = time.time()
        utime(path, times or (now_s, now_s), **options)

    time.time = lambda: clock_s() + wrong_by_s
    os.utime = own_utime


def _wait_at_random(run: Child, cache_dir: Path, seconds: float, random: Random) -> None:
    """Until a moment of the run, or until somebody has claimed work and a moment more."""
    if random.random() < 0.5:
        run.wait(random.uniform(0.0, seconds))
        return
    while run.wait(0.005) and not list(cache_dir.glob("*/claims/*.[0-9]")):
        pass
    run.wait(random.uniform(0.0, 0.1))

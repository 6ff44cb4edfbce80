"""A model with a `CachedAggregator` trains as it does live."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vggt_cache import FeatureCache
from wrap_training import LISTS, STEPS, trained

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_thirty_steps_have_the_same_losses_live_and_cached(tmp_path: Path, checkpointed: bool) -> None:
    live, _ = trained("live", "", checkpointed=checkpointed)
    first, calls = trained("cached", str(tmp_path), checkpointed=checkpointed)
    again, no_calls = trained("offloaded", str(tmp_path), checkpointed=checkpointed)
    assert first == pytest.approx(live, rel=1e-4)
    assert again == first
    assert live[-1] < live[0] / 2
    assert calls == [1] * STEPS  # to compare it with our encoder; nothing is computed by it
    assert no_calls == [0] * STEPS
    with FeatureCache.open(tmp_path, context="joint") as cache:
        assert len(cache) == LISTS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run_two(how: str, cache_dir: Path, scratch: Path) -> list[tuple[list[float], list[int]]]:
    """In two processes under ZeRO-3: of each its losses, and the calls of VGGT after the first epoch and at the end."""
    port, processes, logs = free_port(), [], [scratch / f"{how}{rank}.log" for rank in range(2)]
    for rank, path in enumerate(logs):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        with open(path, "wb") as log:
            command = [sys.executable, str(ROOT / "tests" / "wrap_training.py"), how, str(cache_dir)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=280)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    texts = [path.read_text() for path in logs]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)[-3000:]
    words = [[line.split() for line in text.splitlines()] for text in texts]
    return [
        (
            [float(line[-1]) for line in lines if line[:1] == ["LOSS"]],
            [int(line[-1]) for line in lines if line[:1] == ["CALLS"]],
        )
        for lines in words
    ]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_under_zero3_fill_one_cache_and_train_as_live(tmp_path: Path) -> None:
    live = run_two("live", tmp_path, tmp_path)
    for how in ("cached", "offloaded"):
        found = run_two(how, tmp_path / "cache", tmp_path)
        for (losses, calls), (expected, _) in zip(found, live, strict=True):
            assert losses == pytest.approx(expected, rel=1e-4)
            assert len(losses) == STEPS
            assert calls[0] == calls[-1]
        with FeatureCache.open(tmp_path / "cache", context="joint") as cache:
            assert len(cache) == 2 * LISTS
            copies = [len(cache.copies_of(key)) for key in cache]
        assert copies == [1] * (2 * LISTS)

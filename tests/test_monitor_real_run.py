"""The monitor's figures beside the trainer's own counters, of a run that accumulates and does not log every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from monitor_kit import told
from train_kit import Kit
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings

ROOT = Path(__file__).resolve().parent.parent
ACCUMULATION, LOGGING, STEPS, COVERED = 4, 3, 6, 20

# Notes what the trainer counts, without a share in what it makes of it.
NOTED_TRAINING = """
import json, sys, time
from janusvln.features.computed import LiveEncoder
from janusvln.features.source import FeatureSource
from janusvln.train.command import leave, main
from janusvln.train.trainer import FeatureTrainer
notes, steps, began_s, encode_s = [], 0, None, 0.0
take, encode, get = FeatureSource.take_counts, LiveEncoder.encode, FeatureTrainer.get_batch_samples
def noted_get(self, *args):
    global began_s, steps
    began_s = began_s or time.perf_counter()
    steps += 1
    return get(self, *args)
def noted_encode(self, requests):
    global encode_s
    before_s = time.perf_counter()
    found = encode(self, requests)
    encode_s += time.perf_counter() - before_s
    return found
def noted_take(self):
    global began_s, steps, encode_s
    counts, now_s = take(self), time.perf_counter()
    notes.append(dict(
        steps=steps, samples=counts.batches, hits=counts.hits, misses=counts.misses, wait_s=counts.wait_s,
        encode_s=encode_s, elapsed_s=now_s - began_s,
    ))
    began_s, steps, encode_s = now_s, 0, 0.0
    return counts
FeatureSource.take_counts, LiveEncoder.encode, FeatureTrainer.get_batch_samples = noted_take, noted_encode, noted_get
code = main(sys.argv[2:])
json.dump(notes, open(sys.argv[1], "w"))
leave(code)
"""


def run(kit: Kit, folder: Path, *more: object, cached: bool) -> tuple[str, list[dict[str, Any]]]:
    """The log, and what was noted at each of its lines of metrics."""
    flags = kit.flags(
        folder / "out", "--vggt_cache_miss", "encode", "--vggt_model_path", kit.vggt,
        "--gradient_accumulation_steps", ACCUMULATION, "--logging_steps", LOGGING, "--max_steps", STEPS,
        "--per_device_train_batch_size", 1, "--disable_tqdm", "False", *more, cached=cached,
    )  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "src"),
        "VGGT_CACHE_DIR": "",
        "VGGT_CACHE_DEBUG": "1",
    }
    done = subprocess.run(
        [sys.executable, "-u", "-c", NOTED_TRAINING, str(folder / "notes"), *flags], env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240, check=False,
    )  # fmt: skip
    log = done.stdout.decode()
    assert done.returncode == 0, log[-3000:]
    return log, json.loads((folder / "notes").read_text())


def looks(log: str) -> list[Any]:
    """What the monitor knows after each line of metrics."""
    ends = [at + log[at:].index("}") + 1 for at in range(len(log)) if log.startswith("{'loss'", at)]
    return [told(log[:end]) for end in ends]


def test_the_figures_are_the_trainers_own(kit: Kit, tmp_path: Path) -> None:
    settings = PrecomputeSettings(
        vggt_model_path=str(kit.vggt), data_root=str(kit.data), cache_dir=str(tmp_path / "cache"), image_size=56,
        feature_dtype="float32", num_workers=0, device="cpu", max_samples=COVERED,
    )  # fmt: skip
    assert precompute(settings) == 0
    log, notes = run(kit, tmp_path, "--vggt_cache_dir", tmp_path / "cache", cached=True)
    found = looks(log)
    assert [known.step for known in found] == [3, 6]
    assert [note["steps"] for note in notes] == [LOGGING] * 2
    assert [note["samples"] for note in notes] == [LOGGING * ACCUMULATION] * 2
    assert sum(note["misses"] for note in notes) > 0
    for known, note in zip(found, notes, strict=True):
        assert known.cache_hit_rate == pytest.approx(note["hits"] / (note["hits"] + note["misses"]), rel=1e-3)
        assert known.cache_wait_ms == pytest.approx(1e3 * note["wait_s"] / LOGGING, rel=1e-3, abs=1e-3)
        assert known.encode_ms == pytest.approx(1e3 * note["encode_s"] / LOGGING, rel=0.05)
        assert known.samples_per_s == pytest.approx(note["samples"] / note["elapsed_s"], rel=0.05)
        assert known.slowest_rank == 0
        assert known.encode_ms / 1e3 <= known.slowest_rank_s <= note["elapsed_s"] / LOGGING
    last = found[-1]
    assert (last.total, last.coverage, last.cache_dir) == (STEPS, (COVERED, 32), str(tmp_path / "cache"))
    # Whatever is said stands on a line of its own, also beside the bar.
    assert log.count("[DEBUG]") == sum(note["hits"] for note in notes)
    assert all(
        line.startswith("[DEBUG]") for line in log.replace("\r", "<bar>").splitlines() if "[DEBUG]" in line
    )


def test_without_a_cache_nothing_is_said_of_one(kit: Kit, tmp_path: Path) -> None:
    log, notes = run(kit, tmp_path, cached=False)
    for known, note in zip(looks(log), notes, strict=True):
        assert (known.cache_hit_rate, known.cache_wait_ms, known.cache_dir) == (None, None, None)
        assert known.no_cache == "VGGT runs in every step"
        assert known.encode_ms == pytest.approx(1e3 * note["encode_s"] / LOGGING, rel=0.05)

"""A training step at real size: features as published, live, from the cache and resident; see `bench_step.py`.

Qwen2.5-VL-3B and VGGT-1B with random weights, nine frames 644 wide. Then the memory of each way, and what a step from
the cache is made of.
"""

from __future__ import annotations

import argparse
from functools import partial

from bench_step import speeds
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting
from step_profile import profile_cached_step
from stepper import WAYS, Stepper


def run(setting: Setting, notes: Notes) -> None:
    arguments = argparse.Namespace(
        device=setting.device.type,
        size="tiny" if setting.dry else "real",
        image_size=112 if setting.dry else 644,
        batch_size=1,
        batches=1 if setting.dry else 2,
    )
    notes.tell("configuration", vars(arguments))
    folder = setting.work / "step"
    folder.mkdir()
    bench = Stepper(arguments, folder)
    rounds, pairs = (1, 2) if setting.dry else (3, 10)
    notes.measure("speeds", lambda: speeds(bench, rounds, pairs))
    for way in WAYS:
        notes.measure(f"memory_{way}", partial(bench.memory, way))
    profile = notes.measure("profile", lambda: profile_cached_step(bench))
    if profile is not None:
        notes.tell("visual_tower_s", profile["step_s"] * profile["shares_of_the_forward"]["visual tower"])
    bench.source.close()

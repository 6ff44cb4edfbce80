"""The encoder in context `causal`: an episode's samples with prefixes shared, beside the published way.

What is measured is in `bench_causal.py`; `share` is of the matrix peak. `<width>_flash`: attention by flash, which
makes no plans. `<width>_default`: whatever torch and the encoder choose, which may make a plan for a shape while the
clock runs; what plans cost is the difference between `shared_first_s` and `shared_s`. `<width>`: the faster of both.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from bench_causal import measure
from bench_encoder import HEIGHT_OF_640x480
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting
from vggt_cache.encoder import Encoder

STEPS, BATCH = 40, 16


def run(setting: Setting, notes: Notes) -> None:
    encoder = setting.encoder()
    peak = notes.measure("peak_before", setting.matrix_peak)
    for width in setting.widths:
        found = []
        for attention in ("flash", "default"):
            with setting.attention(attention):
                measured = notes.measure(
                    f"{width}_{attention}", partial(episode, setting, encoder, width, peak)
                )
            found += [{**measured, "attention": attention}] if measured else []
            notes.tell(str(width), max(found, key=lambda one: one["features_per_s"], default=None))
    notes.measure("peak_after", setting.matrix_peak)


def episode(setting: Setting, encoder: Encoder, width: int, peak: float) -> dict[str, Any]:
    arguments = argparse.Namespace(
        steps=3 if setting.dry else STEPS,
        height=HEIGHT_OF_640x480[width],
        width=width,
        batch_size=2 if setting.dry else BATCH,
        seconds=setting.measurement_s,
    )
    figures = measure(encoder, arguments)
    return figures | {"share": figures["flop_per_s"] / peak}

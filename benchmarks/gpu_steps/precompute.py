"""`vggt-cache precompute` from its command's function to the last check, beside the encoder alone.

A checkpoint of the real shapes and a set of photographs are made first. Each run verifies all that it wrote and
computes two features again. What is measured is in `bench_precompute.py`: `of_encoder_alone` is the rate at which
features are written, from the first batch to the last, over the encoder's own rate. Into memory (/dev/shm) at both
widths; in int8; and onto the disk, which may well be the limit there. `writer_alone_per_s`: the writer into memory,
from features that are on the device already (`bench_writer.py`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench_precompute import end_to_end
from bench_scaling import write_model
from bench_writer import Bench
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting
from photographs import write_frames
from vggt_cache.encoder import Checkpoint
from vggt_cache.precompute.settings import PrecomputeSettings

FRAMES, ALONE, BATCH, WORKERS = 640, 192, 16, 12


def run(setting: Setting, notes: Notes) -> None:
    began_s = time.perf_counter()
    data = setting.work / "photographs"
    data.mkdir()
    paths = write_frames(data, 5 if setting.dry else FRAMES)
    notes.tell("photographs_s", time.perf_counter() - began_s)
    model = write_model(setting.work / "model", setting.config, setting.device, torch.bfloat16)
    notes.tell("photographs_and_checkpoint_s", time.perf_counter() - began_s)
    began_s = time.perf_counter()
    encoder = Checkpoint.open(str(model)).load(device=setting.device, compute_dtype=setting.compute_dtype)
    notes.tell("load_s", time.perf_counter() - began_s)

    def once(place: Path, **chosen: Any) -> dict[str, Any]:
        settings = PrecomputeSettings(
            data_root=str(data),
            cache_dir=str(place / "cache"),
            vggt_model_path=str(model),
            batch_size=2 if setting.dry else BATCH,
            num_workers=1 if setting.dry else WORKERS,
            device=setting.device.type,
            verify=True,
            recompute=2,
            **chosen,
        )
        return end_to_end(settings, encoder, paths, alone=4 if setting.dry else ALONE)

    for width in setting.widths:
        notes.measure(str(width), partial(once, setting.work, image_size=width))
    notes.measure("writer_alone_per_s", partial(writer_alone, setting))
    width = setting.widths[0]
    notes.measure(f"{width}_int8", partial(once, setting.work, image_size=width, feature_dtype="int8"))
    if not setting.dry:
        with tempfile.TemporaryDirectory() as disk:
            notes.measure(f"{width}_disk", partial(once, Path(disk), image_size=width))


def writer_alone(setting: Setting) -> float:
    """Features per second, 518 wide, until all are committed."""
    arguments = argparse.Namespace(batch_size=2 if setting.dry else BATCH, features=4 if setting.dry else 384)
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:
        bench = Bench(arguments, Path(folder), 518)
        bench.batch = bench.batch.to(setting.device)
        bench.ours()  # the first is slower
        return bench.features / bench.ours()

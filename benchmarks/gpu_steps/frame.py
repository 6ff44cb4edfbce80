"""The encoder in context `frame`, as a share of the matrix peak: widths, batches, kinds of attention, paths.

<width>_<attention>_batch_<b>   attention by cudnn or by flash, in fused kernels where there are any
<width>_plain                   without fused kernels, by cudnn, batch 16
<width>                         the fastest of these
<width>_kernels                 the largest kernels of a batch of 16 by name, and how many there are
<width>_profile                 shares of its time by class of operation
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType

from bench_encoder import frame_speed
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting, has_fused_path, plain_path
from profile_parts import new_profiler, operation_shares, synchronize

BATCH = 16
BATCHES = {"cudnn": (16, 32, 8, 4, 2, 1), "flash": (16, 4)}
KERNELS = 25


def run(setting: Setting, notes: Notes) -> None:
    encoder = setting.encoder()
    configuration = {"size": setting.size, "compute_dtype": setting.compute_dtype, "widths": setting.widths}
    notes.tell("configuration", configuration)
    notes.tell("fused", has_fused_path(encoder))
    peak = notes.measure("peak_before", setting.matrix_peak)

    def speed(width: int, batch: int, attention: str) -> dict[str, Any]:
        with setting.attention(attention):
            figures: dict[str, Any] = frame_speed(encoder, width, [batch], setting.measurement_s)
        return figures | {"share": figures["flop_per_s"] / peak, "attention": attention}

    for width in setting.widths:
        found = []
        for attention, batches in BATCHES.items():
            for batch in (BATCH,) if setting.dry else batches:
                name = f"{width}_{attention}_batch_{batch}"
                found.append(notes.measure(name, partial(speed, width, batch, attention)))
        with plain_path():
            found.append(notes.measure(f"{width}_plain", partial(speed, width, BATCH, "cudnn")))
        notes.tell(str(width), max(filter(None, found), key=lambda one: one["frames_per_s"], default=None))
    for width in setting.widths:
        pixels = setting.images(width, BATCH).to(setting.device)
        with setting.attention("cudnn"):
            encode = partial(encoder.frame_features, pixels)
            notes.measure(f"{width}_kernels", partial(kernels, encode, setting.device))
            notes.measure(f"{width}_profile", partial(operation_shares, encode, setting.device, 2))
    notes.measure("peak_after", setting.matrix_peak)


def kernels(work: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Of one call, after one to warm up. On a CPU operations stand for kernels."""
    on_gpu = device.type == "cuda"
    work()
    synchronize(device)
    with new_profiler(device) as profiler:
        work()
        synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = [
        (one.key[:120], one.count, 1e-3 * (one.self_device_time_total if on_gpu else one.self_cpu_time_total))
        for one in profiler.key_averages()
        if one.device_type == kind
    ]
    rows.sort(key=lambda row: -row[2])
    return {
        "launched": sum(count for _, count, _ in rows),
        "all_ms": round(sum(ms for _, _, ms in rows), 3),
        "largest": [[name, count, round(ms, 3)] for name, count, ms in rows[:KERNELS]],
    }

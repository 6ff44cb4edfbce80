"""A snapshot as a line in the guide's style, as JSON, and its numbers as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any

from vggt_cache.monitor.alarms import Alarm
from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.snapshot import Snapshot
from vggt_cache.precompute.report import bytes_text


def plain_line(snapshot: Snapshot, gpus: Sequence[Gpu] = ()) -> str:
    """`[2026-02-02 17:30:00] Step: 150 | Speed: 18.5s/it | Throughput: 0.0541 steps/s | ...`

    The time is that of the step. Fields of which nothing is known are left out, but for the first three.
    """
    fields = [f"Step: {snapshot.step}", f"Speed: {speed_text(snapshot.s_per_it)}"]
    fields.append(f"Throughput: {number_text(snapshot.steps_per_s)} steps/s")
    fields += [f"{name}: {text}" for name, text in (*_optional_fields(snapshot), *_gpu_fields(gpus))]
    return f"[{time_text(snapshot.last_step_at_s)}] {' | '.join(fields)}"


def _optional_fields(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for name, value, text in (
        ("Total", snapshot.total, str),
        ("Overall", snapshot.s_per_it_overall, speed_text),
        ("Samples", snapshot.samples_per_s, lambda value: f"{value:.3g}/s"),
        ("Loss", snapshot.loss, number_text),
        ("Grad norm", snapshot.grad_norm, number_text),
        ("LR", snapshot.learning_rate, number_text),
        ("Hit rate", snapshot.cache_hit_rate, percent_text),
        ("Wait", snapshot.cache_wait_ms, milliseconds_text),
        ("Encode", snapshot.encode_ms, milliseconds_text),
        ("Read", snapshot.cache_read_mb_per_s, lambda value: f"{value:.0f} MB/s"),
        ("Slowest rank", snapshot.slowest_rank, str),
        ("Left", snapshot.left_s, clock_text),
    ):
        if value is not None:
            yield name, text(value)


def _gpu_fields(gpus: Sequence[Gpu]) -> Iterator[tuple[str, str]]:
    if used := [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]:
        yield "GPU memory", f"{bytes_text(max(used))} at most"
    if use := [gpu.use_percent for gpu in gpus if gpu.use_percent is not None]:
        yield "GPU use", f"{sum(use) / len(use):.0f}%"


def status_of(snapshot: Snapshot, alarms: Sequence[Alarm]) -> str:
    """`waiting` for the first step, `running`, `stalled`, `finishing` (all steps done) or `ended`."""
    if snapshot.ended:
        return "ended"
    if snapshot.step is None:
        return "waiting"
    if snapshot.finished:
        return "finishing"
    return "stalled" if any(alarm.kind == "stall" for alarm in alarms) else "running"


def json_line(snapshot: Snapshot, alarms: Sequence[Alarm], gpus: Sequence[Gpu], now_s: float) -> str:
    """One object on one line; null for what is not known, and for numbers that are nan or infinite."""
    known: dict[str, Any] = {"time": time_text(now_s), "status": status_of(snapshot, alarms)}
    known |= {**asdict(snapshot), "steps_per_s": snapshot.steps_per_s}
    for found in known["not_finite"]:
        found["value"] = str(found["value"])  # JSON has no nan
    known |= {"gpus": [asdict(gpu) for gpu in gpus], "warnings": [asdict(alarm) for alarm in alarms]}
    return json.dumps({name: _finite(value) for name, value in known.items()}, allow_nan=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------- numbers


def speed_text(s_per_it: float | None) -> str:
    """`18.5s/it`; quick steps keep three digits: `0.0421s/it`."""
    if s_per_it is None:
        return "-"
    return f"{s_per_it:.1f}s/it" if s_per_it >= 10 else f"{s_per_it:.3g}s/it"


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if not math.isfinite(value) else f"{value:.3g}"


def percent_text(share: float) -> str:
    """Cut, not rounded: 99.99 % is not 100 %."""
    return f"{math.floor(share * 1000 + 1e-9) / 10:.1f}%" if math.isfinite(share) else str(share)


def milliseconds_text(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value:.0f} ms"


def clock_text(seconds: float) -> str:
    """`H:MM:SS`, hours growing beyond a day as tqdm has it."""
    total = round(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def time_text(at_s: float | None) -> str:
    """Local time, as in the guide."""
    return "-" if at_s is None else datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")

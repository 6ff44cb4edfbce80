"""How a run goes on as a line in the guide's style, as JSON, and its numbers as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.progress import Alarm, Progress
from vggt_cache.precompute.report import bytes_text


@dataclass(frozen=True, kw_only=True)
class Look:
    """All that is to be shown at one moment."""

    progress: Progress
    alarms: Sequence[Alarm]
    gpus: Sequence[Gpu]
    notes: Sequence[str]
    """What is no fault but good to know, such as that there is no log yet."""
    now_s: float

    @property
    def status(self) -> str:
        """`waiting` for the first step, `running`, `stalled`, `finishing` (all steps done) or `ended`."""
        if self.progress.ended:
            return "ended"
        if self.progress.step is None:
            return "waiting"
        if self.progress.finished:
            return "finishing"
        return "stalled" if any(alarm.kind == "stall" for alarm in self.alarms) else "running"


def plain_line(progress: Progress, gpus: Sequence[Gpu] = ()) -> str:
    """`[2026-02-02 17:30:00] Step: 150 | Speed: 18.5s/it | Throughput: 0.0541 steps/s | ...`

    The time is that of the step. Fields of which nothing is known are left out, but for the first three.
    """
    fields = [f"Step: {progress.step}", f"Speed: {speed_text(progress.s_per_it)}"]
    fields.append(f"Throughput: {number_text(progress.steps_per_s)} steps/s")
    fields += [f"{name}: {text}" for name, text in _optional_fields(progress, gpus)]
    return f"[{time_text(progress.last_step_at_s)}] {' | '.join(fields)}"


def _optional_fields(progress: Progress, gpus: Sequence[Gpu]) -> Iterator[tuple[str, str]]:
    for name, value, text in (
        ("Total", progress.total, str),
        ("Overall", progress.s_per_it_overall, speed_text),
        ("Samples", progress.samples_per_s, lambda value: f"{value:.3g}/s"),
        ("Loss", progress.loss, number_text),
        ("Grad norm", progress.grad_norm, number_text),
        ("LR", progress.learning_rate, number_text),
        ("Hit rate", progress.cache_hit_rate, percent_text),
        ("Wait", progress.cache_wait_ms, milliseconds_text),
        ("Encode", progress.encode_ms, milliseconds_text),
        ("Read", progress.cache_read_mb_per_s, lambda value: f"{value:.0f} MB/s"),
        ("Slowest rank", progress.slowest_rank, str),
        ("Left", progress.left_s, clock_text),
    ):
        if value is not None:
            yield name, text(value)
    if used := [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]:
        yield "GPU memory", f"{bytes_text(max(used))} at most"
    if use := [gpu.use_percent for gpu in gpus if gpu.use_percent is not None]:
        yield "GPU use", f"{sum(use) / len(use):.0f}%"


def json_line(look: Look) -> str:
    """One object on one line; null for what is not known, and for numbers that are nan or infinite."""
    known: dict[str, Any] = {"time": time_text(look.now_s), "status": look.status, **asdict(look.progress)}
    for found in known["not_finite"]:
        found["value"] = str(found["value"])  # JSON has no nan
    known |= {
        "steps_per_s": look.progress.steps_per_s,
        "gpus": [asdict(gpu) for gpu in look.gpus],
        "warnings": [asdict(alarm) for alarm in look.alarms],
    }
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in known.items()
    }
    return json.dumps(finite, allow_nan=False)


# ---------------------------------------------------------------- numbers


def speed_text(s_per_it: float | None) -> str:
    """`18.5s/it`; quick steps keep three digits: `0.0421s/it`."""
    if s_per_it is None:
        return "-"
    return f"{s_per_it:.1f}s/it" if s_per_it >= 10 else f"{s_per_it:.3g}s/it"


def number_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


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
    """Local time, as in the guide; `-` also for one that no calendar has."""
    try:
        return "-" if at_s is None else datetime.fromtimestamp(at_s).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "-"

"""How a run goes on: as a line in the guide's style, as JSON, as a table for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.progress import Alarm, Progress
from vggt_cache.precompute.report import bytes_text, seconds_text

if TYPE_CHECKING:  # what draws the table is slow to import, and not needed in a pipe
    from rich.console import RenderableType

_BAR_COLUMNS = 30
_ON_ONE_LINE = ("Cache", "Log")
"""Paths may be long, and a terminal has few lines."""


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


_FIELDS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("Total", "", "total", str),
    ("Overall", "", "s_per_it_overall", speed_text),
    ("Samples", "", "samples_per_s", lambda value: f"{value:.3g}/s"),
    ("Loss", "Loss", "loss", number_text),
    ("Grad norm", "Loss/gradient norm", "grad_norm", number_text),
    ("LR", "Loss/learning rate", "learning_rate", number_text),
    ("Hit rate", "Features/hit rate", "cache_hit_rate", percent_text),
    ("Wait", "Features/wait", "cache_wait_ms", milliseconds_text),
    ("Encode", "Features/encode", "encode_ms", milliseconds_text),
    ("Read", "Features/read", "cache_read_mb_per_s", lambda value: f"{value:.0f} MB/s"),
    ("Slowest rank", "", "slowest_rank", str),
    ("No cache", "", "no_cache", str),
    ("Left", "", "left_s", clock_text),
)
"""The name in the line; the row in the table, with the name there, if it says just this; the name in `Progress`; how it
is written."""


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
    for name, _, known, text in _FIELDS:
        if (value := getattr(progress, known)) is not None:
            fields.append(f"{name}: {text(value)}")
    if used := [gpu.memory_used_bytes for gpu in gpus if gpu.memory_used_bytes is not None]:
        fields.append(f"GPU memory: {bytes_text(max(used))} at most")
    if use := [gpu.use_percent for gpu in gpus if gpu.use_percent is not None]:
        fields.append(f"GPU use: {sum(use) / len(use):.0f}%")
    return f"[{time_text(progress.last_step_at_s)}] {' | '.join(fields)}"


def json_line(look: Look) -> str:
    """One object on one line; null for what is not known, and for numbers that are nan or infinite."""
    known: dict[str, Any] = {"time": time_text(look.now_s), "status": look.status, **asdict(look.progress)}
    known["steps_per_s"] = look.progress.steps_per_s
    for found in known["not_finite"]:
        found["value"] = str(found["value"])  # JSON has no nan
    known |= {name: None for name, one in known.items() if isinstance(one, float) and not math.isfinite(one)}
    known |= {
        "gpus": [asdict(gpu) for gpu in look.gpus],
        "warnings": [asdict(alarm) for alarm in look.alarms],
    }
    return json.dumps(known, allow_nan=False)


def table_of(look: Look) -> RenderableType:
    """What deserves attention, the run, and the cards of this machine: 8 of them and all else within 80 x 24.

    A terminal that is too small cuts off the end, so what matters most stands first.
    """
    from rich.columns import Columns
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    progress = look.progress
    lines = [Text(f"[WARN] {alarm.text}", style="bold yellow") for alarm in look.alarms]
    lines += [Text(f"[INFO] {note}") for note in look.notes]
    run = Table(show_header=False)
    run.add_column(style="cyan", no_wrap=True)
    run.add_column()
    if progress.step is not None and progress.total:
        run.add_row("Progress", ProgressBar(progress.total, progress.step, width=_BAR_COLUMNS))
    for name, text in _rows(progress, look.now_s):
        # Of a path, the end tells most.
        run.add_row(name, Text(text, no_wrap=name in _ON_ONE_LINE, overflow="ellipsis"))
    parts: list[RenderableType] = [Text(f"Training: {look.status}", style="bold"), *lines, run]
    if look.gpus:
        names = ", ".join(dict.fromkeys(gpu.name for gpu in look.gpus))
        parts.append(Text(f"GPUs of this machine: {names}", no_wrap=True, overflow="ellipsis"))
        parts.append(Columns([Text(_card_text(gpu)) for gpu in look.gpus], padding=(0, 2)))
    return Group(*parts)


def _card_text(gpu: Gpu) -> str:
    """`3: 61.2 of 79.6 GiB 97%`"""
    used, total = (
        "-" if size is None else bytes_text(size) for size in (gpu.memory_used_bytes, gpu.memory_total_bytes)
    )
    if used.split()[1:] == total.split()[1:]:
        used = used.split()[0]
    return f"{gpu.index}: {used} of {total} {'-' if gpu.use_percent is None else f'{gpu.use_percent:.0f}%'}"


def _rows(progress: Progress, now_s: float) -> Iterator[tuple[str, str]]:
    """What the log has said of each, and nothing of what it has not."""
    if progress.step is not None:
        share = f" ({progress.step / progress.total:.1%})" if progress.total else ""
        epoch = f", epoch {progress.epoch:.2f}" if progress.epoch is not None else ""
        yield "Step", f"{progress.step} of {progress.total}{share}{epoch}"
        recent, overall = speed_text(progress.s_per_it), speed_text(progress.s_per_it_overall)
        yield "Speed", f"{recent} recent, {overall} overall"
        samples = f", {progress.samples_per_s:.3g} samples/s" if progress.samples_per_s is not None else ""
        yield "Throughput", f"{number_text(progress.steps_per_s)} steps/s{samples}"
    covered = f"{progress.coverage[0]} of {progress.coverage[1]} features in " if progress.coverage else ""
    loss = f", mean loss {number_text(progress.train_loss)}" if progress.train_loss is not None else ""
    took = f", {progress.slowest_rank_s:.3g} s per step" if progress.slowest_rank_s is not None else ""
    left_s = None if progress.finished else progress.left_s
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("Time left", left_s, lambda value: f"{clock_text(value)}, until {time_text(now_s + value)}"),
        ("Ended", progress.train_runtime_s, lambda value: f"after {seconds_text(value)}{loss}"),
        ("Last step", progress.last_step_at_s, lambda value: f"{seconds_text(max(0.0, now_s - value))} ago"),
        ("Loss", _joined(progress, "Loss") or None, str),
        ("Features", _joined(progress, "Features") or None, str),
        ("Slowest rank", progress.slowest_rank, lambda value: f"{value}{took}"),
        ("Cache", progress.cache_dir, lambda value: covered + value),
        ("Cache", progress.no_cache, lambda value: f"no cache: {value}"),
        ("Log", progress.log, str),
    ]
    yield from ((name, text(value)) for name, value, text in rows if value is not None)


def _joined(progress: Progress, row: str) -> str:
    """All fields of one row of the table, those of which something is known."""
    parts = []
    for _, place, known, text in _FIELDS:
        if place.split("/")[0] == row and (value := getattr(progress, known)) is not None:
            parts.append(f"{place.partition('/')[2]} {text(value)}".strip())
    return ", ".join(parts)

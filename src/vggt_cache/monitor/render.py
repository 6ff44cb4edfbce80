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
    ("Grad norm", "Gradient norm", "grad_norm", number_text),
    ("LR", "Learning rate", "learning_rate", number_text),
    ("Hit rate", "Hit rate", "cache_hit_rate", percent_text),
    ("Wait", "Cache wait", "cache_wait_ms", milliseconds_text),
    ("Encode", "Encode", "encode_ms", milliseconds_text),
    ("Read", "Read", "cache_read_mb_per_s", lambda value: f"{value:.0f} MB/s"),
    ("Slowest rank", "", "slowest_rank", str),
    ("Left", "", "left_s", clock_text),
)
"""The name in the line; the name in the table, if it says just this; the name in `Progress`; how it is written."""


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
    """The run, the cards of this machine, and what deserves attention."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    progress = look.progress
    run = Table(title=Text(f"{progress.log or 'no log'}: {look.status}"), show_header=False)
    run.add_column(style="cyan", no_wrap=True)
    run.add_column()
    if progress.step is not None and progress.total:
        run.add_row("Progress", ProgressBar(progress.total, progress.step, width=_BAR_COLUMNS))
    for name, text in _rows(progress, look.now_s):
        run.add_row(name, Text(text))
    cards = Table("GPU", "Name", "Memory", "Use", title=Text("GPUs of this machine"))
    for gpu in look.gpus:
        memory = (gpu.memory_used_bytes, gpu.memory_total_bytes)
        texts = ("-" if size is None else bytes_text(size) for size in memory)
        use = "-" if gpu.use_percent is None else f"{gpu.use_percent:.0f}%"
        cards.add_row(str(gpu.index), Text(gpu.name), " of ".join(texts), use)
    warnings = [Text(f"[WARN] {alarm.text}", style="bold yellow") for alarm in look.alarms]
    notes = [Text(f"[INFO] {note}") for note in look.notes]
    return Group(run, *([cards] if look.gpus else []), *warnings, *notes)


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
    covered = f", {progress.coverage[0]} of {progress.coverage[1]} features" if progress.coverage else ""
    loss = f", mean loss {number_text(progress.train_loss)}" if progress.train_loss is not None else ""
    took = f", {progress.slowest_rank_s:.3g} s per step" if progress.slowest_rank_s is not None else ""
    left_s = None if progress.finished else progress.left_s
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        *((name, getattr(progress, known), text) for _, name, known, text in _FIELDS if name),
        ("Slowest rank", progress.slowest_rank, lambda value: f"{value}{took}"),
        ("Cache", progress.cache_dir, lambda value: value + covered),
        ("Ended", progress.train_runtime_s, lambda value: f"after {seconds_text(value)}{loss}"),
        ("Time left", left_s, lambda value: f"{clock_text(value)}, until {time_text(now_s + value)}"),
        ("Last step", progress.last_step_at_s, lambda value: f"{seconds_text(max(0.0, now_s - value))} ago"),
    ]
    yield from ((name, text(value)) for name, value, text in rows if value is not None)

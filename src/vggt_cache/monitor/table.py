"""How a run goes on, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.render import (
    Look,
    clock_text,
    milliseconds_text,
    number_text,
    percent_text,
    speed_text,
    time_text,
)
from vggt_cache.precompute.report import bytes_text, seconds_text

_BAR_COLUMNS = 30


def table_of(look: Look) -> RenderableType:
    """The whole picture: the run, the cards of this machine, and what deserves attention."""
    parts: list[RenderableType] = [_run_table(look)]
    if look.gpus:
        parts.append(_gpu_table(look.gpus))
    parts += [Text(f"[WARN] {alarm.text}", style="bold yellow") for alarm in look.alarms]
    parts += [Text(f"[INFO] {note}") for note in look.notes]
    return Group(*parts)


def _run_table(look: Look) -> Table:
    progress = look.progress
    table = Table(title=Text(f"{progress.log or 'no log'}: {look.status}"), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    if progress.step is not None and progress.total:
        bar = ProgressBar(total=progress.total, completed=progress.step, width=_BAR_COLUMNS)
        table.add_row("Progress", bar)
    for name, text in (*_step_rows(progress), *_logged_rows(progress), *_time_rows(progress, look.now_s)):
        table.add_row(name, Text(text))
    return table


def _step_rows(progress: Progress) -> Iterator[tuple[str, str]]:
    if progress.step is None:
        return
    share = f" ({progress.step / progress.total:.1%})" if progress.total else ""
    epoch = f", epoch {progress.epoch:.2f}" if progress.epoch is not None else ""
    yield "Step", f"{progress.step} of {progress.total}{share}{epoch}"
    yield "Speed", f"{speed_text(progress.s_per_it)} recent, {speed_text(progress.s_per_it_overall)} overall"
    samples = f", {progress.samples_per_s:.3g} samples/s" if progress.samples_per_s is not None else ""
    yield "Throughput", f"{number_text(progress.steps_per_s)} steps/s{samples}"


def _logged_rows(progress: Progress) -> Iterator[tuple[str, str]]:
    """What the log has said of each, and nothing of what it has not."""
    covered = f", {progress.coverage[0]} of {progress.coverage[1]} features" if progress.coverage else ""
    loss = f", mean loss {number_text(progress.train_loss)}" if progress.train_loss is not None else ""
    took = f", {progress.slowest_rank_s:.3g} s per step" if progress.slowest_rank_s is not None else ""
    known: tuple[tuple[str, Any, Callable[[Any], str]], ...] = (
        ("Loss", progress.loss, number_text),
        ("Gradient norm", progress.grad_norm, number_text),
        ("Learning rate", progress.learning_rate, number_text),
        ("Ended", progress.train_runtime_s, lambda value: f"after {seconds_text(value)}{loss}"),
        ("Cache", progress.cache_dir, lambda value: value + covered),
        ("Hit rate", progress.cache_hit_rate, percent_text),
        ("Cache wait", progress.cache_wait_ms, lambda value: f"{milliseconds_text(value)} per step"),
        ("Encode", progress.encode_ms, lambda value: f"{milliseconds_text(value)} per step"),
        ("Read", progress.cache_read_mb_per_s, lambda value: f"{value:.0f} MB/s"),
        ("Slowest rank", progress.slowest_rank, lambda value: f"{value}{took}"),
    )
    for name, value, text in known:
        if value is not None:
            yield name, text(value)


def _time_rows(progress: Progress, now_s: float) -> Iterator[tuple[str, str]]:
    if progress.left_s is not None and not progress.finished:
        yield "Time left", f"{clock_text(progress.left_s)}, until {time_text(now_s + progress.left_s)}"
    if progress.last_step_at_s is not None:
        yield "Last step", f"{seconds_text(max(0.0, now_s - progress.last_step_at_s))} ago"


def _gpu_table(gpus: Sequence[Gpu]) -> Table:
    table = Table(title=Text("GPUs of this machine"))
    for name in ("GPU", "Name", "Memory", "Use"):
        table.add_column(name)
    for gpu in gpus:
        memory = (gpu.memory_used_bytes, gpu.memory_total_bytes)
        texts = ("-" if size is None else bytes_text(size) for size in memory)
        use = "-" if gpu.use_percent is None else f"{gpu.use_percent:.0f}%"
        table.add_row(str(gpu.index), Text(gpu.name), " of ".join(texts), use)
    return table

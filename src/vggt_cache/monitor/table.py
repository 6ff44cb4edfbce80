"""A snapshot as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vggt_cache.monitor.alarms import Alarm
from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.render import (
    clock_text,
    milliseconds_text,
    number_text,
    percent_text,
    speed_text,
    status_of,
    time_text,
)
from vggt_cache.monitor.snapshot import Snapshot
from vggt_cache.precompute.report import bytes_text, seconds_text

_BAR_COLUMNS = 30


def table_of(
    snapshot: Snapshot, alarms: Sequence[Alarm], gpus: Sequence[Gpu], notes: Sequence[str], now_s: float
) -> RenderableType:
    """The whole picture: the run, the cards of this machine, and what deserves attention."""
    parts: list[RenderableType] = [_run_table(snapshot, alarms, now_s)]
    if gpus:
        parts.append(_gpu_table(gpus))
    parts += [Text(f"[WARN] {alarm.text}", style="bold yellow") for alarm in alarms]
    parts += [Text(f"[INFO] {note}") for note in notes]
    return Group(*parts)


def _run_table(snapshot: Snapshot, alarms: Sequence[Alarm], now_s: float) -> Table:
    table = Table(title=Text(f"{snapshot.log or 'no log'}: {status_of(snapshot, alarms)}"), show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    if snapshot.step is not None and snapshot.total:
        bar = ProgressBar(total=snapshot.total, completed=snapshot.step, width=_BAR_COLUMNS)
        table.add_row("Progress", bar)
    for name, text in _rows(snapshot, now_s):
        table.add_row(name, Text(text))
    return table


def _rows(snapshot: Snapshot, now_s: float) -> Iterator[tuple[str, str]]:
    if snapshot.step is not None:
        yield "Step", f"{snapshot.step} of {snapshot.total}{_share_text(snapshot)}"
        yield (
            "Speed",
            f"{speed_text(snapshot.s_per_it)} recent, {speed_text(snapshot.s_per_it_overall)} overall",
        )
        yield "Throughput", _throughput_text(snapshot)
    yield from _metric_rows(snapshot)
    yield from _cache_rows(snapshot)
    if snapshot.left_s is not None and not snapshot.finished:
        yield "Time left", f"{clock_text(snapshot.left_s)}, until {time_text(now_s + snapshot.left_s)}"
    if snapshot.last_step_at_s is not None:
        yield "Last step", f"{seconds_text(max(0.0, now_s - snapshot.last_step_at_s))} ago"


def _share_text(snapshot: Snapshot) -> str:
    share = f" ({snapshot.step / snapshot.total:.1%})" if snapshot.total and snapshot.step is not None else ""
    return share + (f", epoch {snapshot.epoch:.2f}" if snapshot.epoch is not None else "")


def _throughput_text(snapshot: Snapshot) -> str:
    samples = f", {snapshot.samples_per_s:.3g} samples/s" if snapshot.samples_per_s is not None else ""
    return f"{number_text(snapshot.steps_per_s)} steps/s{samples}"


def _metric_rows(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for name, value in (
        ("Loss", snapshot.loss),
        ("Gradient norm", snapshot.grad_norm),
        ("Learning rate", snapshot.learning_rate),
    ):
        if value is not None:
            yield name, number_text(value)
    if snapshot.train_runtime_s is not None:
        loss = f", mean loss {number_text(snapshot.train_loss)}" if snapshot.train_loss is not None else ""
        yield "Ended", f"after {seconds_text(snapshot.train_runtime_s)}{loss}"


def _cache_rows(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    if snapshot.cache_dir is not None:
        covered = f", {snapshot.coverage[0]} of {snapshot.coverage[1]} features" if snapshot.coverage else ""
        yield "Cache", snapshot.cache_dir + covered
    if snapshot.cache_hit_rate is not None:
        yield "Hit rate", percent_text(snapshot.cache_hit_rate)
    if snapshot.cache_wait_ms is not None:
        yield "Cache wait", f"{milliseconds_text(snapshot.cache_wait_ms)} per step"
    if snapshot.encode_ms is not None:
        yield "Encode", f"{milliseconds_text(snapshot.encode_ms)} per step"
    if snapshot.cache_read_mb_per_s is not None:
        yield "Read", f"{snapshot.cache_read_mb_per_s:.0f} MB/s"
    if snapshot.slowest_rank is not None:
        took = f", {snapshot.slowest_rank_s:.3g} s per step" if snapshot.slowest_rank_s is not None else ""
        yield "Slowest rank", f"{snapshot.slowest_rank}{took}"


def _gpu_table(gpus: Sequence[Gpu]) -> Table:
    table = Table(title=Text("GPUs of this machine"))
    for name in ("GPU", "Name", "Memory", "Use"):
        table.add_column(name)
    for gpu in gpus:
        memory = [gpu.memory_used_bytes, gpu.memory_total_bytes]
        texts = ["-" if size is None else bytes_text(size) for size in memory]
        use = "-" if gpu.use_percent is None else f"{gpu.use_percent:.0f}%"
        table.add_row(str(gpu.index), Text(gpu.name), " of ".join(texts), use)
    return table

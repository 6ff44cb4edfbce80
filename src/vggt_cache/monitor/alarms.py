"""What deserves attention in how a run goes on. Each alarm is one sentence: what, what it means, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vggt_cache.monitor.progress import NonFinite, Progress
from vggt_cache.monitor.settings import MonitorSettings
from vggt_cache.precompute.report import count_of, seconds_text

_STALL_STEPS = 5
_SHORTEST_STALL_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One thing that deserves attention."""

    kind: str
    """`stall`, `hit_rate`, `not_finite` or `failure`."""
    text: str


def alarms_of(progress: Progress, settings: MonitorSettings, now_s: float) -> tuple[Alarm, ...]:
    """All that deserves attention at the time `now_s` (seconds since 1970)."""
    return (
        *_failure(progress),
        *_not_finite(progress),
        *_stall(progress, settings, now_s),
        *_hit_rate(progress, settings),
    )


def stall_threshold_s(progress: Progress, settings: MonitorSettings) -> float:
    """The time without a step from which on a run counts as stalled."""
    if settings.stall_s is not None:
        return settings.stall_s
    return max(_STALL_STEPS * (progress.s_per_it or progress.s_per_it_overall or 0.0), _SHORTEST_STALL_S)


def _stall(progress: Progress, settings: MonitorSettings, now_s: float) -> Iterator[Alarm]:
    if progress.step is None or progress.finished or progress.last_progress_at_s is None:
        return
    age_s = now_s - progress.last_progress_at_s
    if age_s <= stall_threshold_s(progress, settings):
        return
    usual = f" (usual: {progress.s_per_it:.3g} s)" if progress.s_per_it else ""
    yield Alarm(
        kind="stall",
        text=f"no new step for {seconds_text(age_s)}{usual} and no line that ends the run: it hangs, or was ended "
        "from outside; look at the end of the log and at the processes of all ranks",
    )


def _hit_rate(progress: Progress, settings: MonitorSettings) -> Iterator[Alarm]:
    recent, best = progress.cache_hit_rate_recent, progress.cache_hit_rate_best
    if recent is None or best is None or best - recent <= settings.hit_rate_drop:
        return
    yield Alarm(
        kind="hit_rate",
        text=f"the hit rate fell from {best:.1%} to {recent:.1%}: features are missing from the cache and are "
        "encoded in the step, which slows it down; verify the cache against this data (vggt-cache verify)",
    )


def _not_finite(progress: Progress) -> Iterator[Alarm]:
    for found in progress.not_finite:
        yield Alarm(kind="not_finite", text=_sentence(found))


def _sentence(found: NonFinite) -> str:
    near = f" near step {found.step}" if found.step is not None else ""
    lines = f"{count_of(found.lines, 'line')} of those read"
    if found.now:
        return (
            f"{found.name} is {found.value:g}{near} ({lines}): the weights may be spoiled; stop, and go on from a "
            "checkpoint before that, with a lower learning rate"
        )
    return f"{found.name} was {found.value:g} in {lines}, last{near}, and is finite again: watch it"


def _failure(progress: Progress) -> Iterator[Alarm]:
    if progress.failure and not progress.ended:
        yield Alarm(kind="failure", text=f"since the last step the log reports: {progress.failure}")

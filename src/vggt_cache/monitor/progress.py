"""What is known of a run at one moment, under the names of the JSON output, and what deserves attention in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from vggt_cache.monitor import MonitorSettings
from vggt_cache.precompute.report import count_of, seconds_text

_STALL_STEPS = 5
_SHORTEST_STALL_S = 120.0


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A logged number that was nan or infinite: in how many lines, the latest value, its step, whether it still is."""

    name: str
    value: float
    lines: int
    step: int | None
    now: bool


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One run at one moment; None for what its log does not say. docs/monitor.md describes each under its name."""

    log: str | None = None
    log_bytes: int = 0
    modified_at_s: float | None = None
    step: int | None = None
    total: int | None = None
    epoch: float | None = None
    elapsed_s: int | None = None
    left_s: float | None = None
    last_step_at_s: float | None = None
    last_progress_at_s: float | None = None
    s_per_it: float | None = None
    s_per_it_overall: float | None = None
    samples_per_s: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    cache_hit_rate: float | None = None
    cache_hit_rate_recent: float | None = None
    cache_hit_rate_best: float | None = None
    cache_staged_rate: float | None = None
    cache_wait_ms: float | None = None
    cache_read_mb_per_s: float | None = None
    encode_ms: float | None = None
    slowest_rank: int | None = None
    slowest_rank_s: float | None = None
    cache_dir: str | None = None
    no_cache: str | None = None
    coverage: tuple[int, int] | None = None
    ended: bool = False
    train_runtime_s: float | None = None
    train_loss: float | None = None
    not_finite: tuple[NonFinite, ...] = ()
    failure: str | None = None

    @property
    def steps_per_s(self) -> float | None:
        return 1 / self.s_per_it if self.s_per_it else None

    @property
    def finished(self) -> bool:
        """Whether all steps are done; saving the model and the last line may still come."""
        return self.ended or (self.step is not None and self.step == self.total)


@dataclass(frozen=True)
class Alarm:
    """One sentence: what deserves attention, what it means, what to do."""

    kind: str
    text: str


def alarms_of(progress: Progress, settings: MonitorSettings, now_s: float) -> Iterator[Alarm]:
    """All that deserves attention at the time `now_s` (seconds since 1970)."""
    if progress.failure and not progress.ended:
        yield Alarm("failure", f"since the last step the log reports: {progress.failure}")
    for found in progress.not_finite:
        yield Alarm("not_finite", _sentence(found))
    since_s = progress.last_progress_at_s
    going_on = progress.step is not None and not progress.finished
    if going_on and since_s is not None and now_s - since_s > stall_threshold_s(progress, settings):
        usual = f" (usual: {progress.s_per_it:.3g} s)" if progress.s_per_it else ""
        yield Alarm(
            "stall",
            f"no new step for {seconds_text(now_s - since_s)}{usual} and no line that ends the run: it hangs, or "
            "was ended from outside; look at the end of the log and at the processes of all ranks",
        )
    recent, best = progress.cache_hit_rate_recent, progress.cache_hit_rate_best
    if recent is not None and best is not None and best - recent > settings.hit_rate_drop:
        yield Alarm(
            "hit_rate",
            f"the hit rate fell from {best:.1%} to {recent:.1%}: features are missing from the cache and are "
            "encoded in the step, which slows it down; verify the cache against this data (vggt-cache verify)",
        )


def stall_threshold_s(progress: Progress, settings: MonitorSettings) -> float:
    """The time without a step from which on a run counts as stalled."""
    if settings.stall_s is not None:
        return settings.stall_s
    return max(_STALL_STEPS * (progress.s_per_it or progress.s_per_it_overall or 0.0), _SHORTEST_STALL_S)


def _sentence(found: NonFinite) -> str:
    near = "" if found.step is None else f" near step {found.step}"
    lines = f"{count_of(found.lines, 'line')} of those read"
    if found.now:
        return (
            f"{found.name} is {found.value:g}{near} ({lines}): the weights may be spoiled; stop, and go on from a "
            "checkpoint before that, with a lower learning rate"
        )
    return f"{found.name} was {found.value:g} in {lines}, last{near}, and is finite again: watch it"

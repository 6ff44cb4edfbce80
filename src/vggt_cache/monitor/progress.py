"""What is known of a run at one moment; the JSON output has the same names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """A logged number that was nan or infinite."""

    name: str
    value: float
    """The latest that was not finite."""
    lines: int
    """In how many of the lines that were read."""
    step: int | None
    """At the last of them, as near as the log tells."""
    now: bool
    """Whether the newest line has it too."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One run at one moment; None for what its log does not say. Times of day are seconds since 1970."""

    log: str | None = None
    log_bytes: int = 0
    modified_at_s: float | None = None
    step: int | None = None
    total: int | None = None
    epoch: float | None = None
    elapsed_s: int | None = None
    """Since this run's bar began."""
    left_s: float | None = None
    last_step_at_s: float | None = None
    last_progress_at_s: float | None = None
    """The same, or the last step of an evaluation."""
    s_per_it: float | None = None
    """Recent; see bars.py."""
    s_per_it_overall: float | None = None
    samples_per_s: float | None = None
    loss: float | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    cache_hit_rate: float | None = None
    cache_hit_rate_recent: float | None = None
    """Mean of the last three lines."""
    cache_hit_rate_best: float | None = None
    """The largest such mean in this run."""
    cache_wait_ms: float | None = None
    cache_read_mb_per_s: float | None = None
    encode_ms: float | None = None
    slowest_rank: int | None = None
    slowest_rank_s: float | None = None
    cache_dir: str | None = None
    coverage: tuple[int, int] | None = None
    ended: bool = False
    train_runtime_s: float | None = None
    train_loss: float | None = None
    not_finite: tuple[NonFinite, ...] = ()
    failure: str | None = None
    """The last error in the log since its last step."""

    @property
    def steps_per_s(self) -> float | None:
        return 1 / self.s_per_it if self.s_per_it else None

    @property
    def finished(self) -> bool:
        """Whether all steps are done; saving the model and the last line may still come."""
        return self.ended or (self.step is not None and self.step == self.total)

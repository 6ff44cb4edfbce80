"""What the user asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """The flags of `monitor`, under their own names."""

    logs: tuple[str, ...]
    """Files, glob patterns or directories; what they match is looked up again at each interval."""
    once: bool = False
    """Say what there is now and stop."""
    json: bool = False
    interval: float = 5.0
    """Seconds between two looks at the logs."""
    stall_s: float | None = None
    """Warn when no step has come for so long; None: the larger of 5 x the recent s/it and 120 s."""
    hit_rate_drop: float = 0.05
    """Warn when the hit rate of the last lines is so far below the best of this run; between 0 and 1."""
    samples_per_step: int | None = None
    """Samples in one step over all ranks; None: as the log says, if it does."""

    def __post_init__(self) -> None:
        if not self.interval > 0:
            raise SettingsError(
                f"--interval {self.interval:g} is not a time to wait: give seconds, such as 5"
            )
        if self.stall_s is not None and not self.stall_s > 0:
            raise SettingsError(
                f"--stall_s {self.stall_s:g} would warn all the time: give seconds, such as 600"
            )
        if not 0 < self.hit_rate_drop <= 1:
            raise SettingsError(
                f"--hit_rate_drop {self.hit_rate_drop:g} is not a difference of hit rates: give a number "
                "over 0 and up to 1, such as 0.05"
            )
        if self.samples_per_step is not None and self.samples_per_step < 1:
            raise SettingsError(
                f"--samples_per_step {self.samples_per_step} cannot be: give batch size x accumulation x ranks"
            )

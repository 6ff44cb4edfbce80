"""Watches a training run through its log: where it is, how fast, how well the cache serves it, what is wrong.

Nothing is asked of the trainer but its log, so logs of other trainers on transformers' Trainer work as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.errors import SettingsError
from vggt_cache.flags import flag


@dataclass(frozen=True, kw_only=True)
class MonitorSettings:
    """The flags of `monitor`, under their own names, checked before anything is read."""

    logs: tuple[str, ...]
    """Files, glob patterns or directories; what they match is looked up again at each interval."""
    once: bool = flag(False, help="say what there is now and stop; 1 where something is wrong")
    json: bool = flag(False, help="one JSON object on a line each time it reads the log")
    interval: float = flag(5.0, metavar="S", help="seconds between two looks")
    stall_s: float | None = flag(
        None,
        kind=float,
        metavar="S",
        help="warn when no step has come for so long; the larger of 5 x s/it and 120 s where not given",
    )
    hit_rate_drop: float = flag(0.05, metavar="SHARE", help="warn when the hit rate fell by more")
    samples_per_step: int | None = flag(
        None, kind=int, metavar="N", help="for samples/s, where the log does not say it"
    )

    def __post_init__(self) -> None:
        stall_s, count = self.stall_s, self.samples_per_step
        drop = "is not a difference of hit rates: give a number over 0 and up to 1, such as 0.05"
        samples = "cannot be: give batch size x accumulation x ranks"
        for name, sound, advice in (
            ("interval", self.interval > 0, "is not a time to wait: give seconds, such as 5"),
            ("stall_s", stall_s is None or stall_s > 0, "would warn all the time: give seconds, such as 600"),
            ("hit_rate_drop", 0 < self.hit_rate_drop <= 1, drop),
            ("samples_per_step", count is None or count >= 1, samples),
        ):
            if not sound:
                raise SettingsError(f"--{name} {getattr(self, name):g} {advice}")

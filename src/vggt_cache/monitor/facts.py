"""What the lines of one run say, beside its progress bar."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace

from vggt_cache.monitor.parse import Ended
from vggt_cache.monitor.snapshot import NonFinite

_LINES_OF_HIT_RATE = 3


class RunFacts:
    """A resumed run begins with new ones."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.ended: Ended | None = None
        self.failure: str | None = None
        """The first error since the last step."""
        self.not_finite: dict[str, NonFinite] = {}
        self._hit_rates: deque[float] = deque(maxlen=_LINES_OF_HIT_RATE)
        self.best_hit_rate: float | None = None

    def log(self, values: dict[str, float], step: int | None) -> None:
        """Take in one line of metrics; `step` is the last one before it."""
        self.values |= values
        for name in ("loss", "grad_norm"):
            if name in values:
                self._watch(name, values[name], step)
        if math.isfinite(rate := values.get("cache_hit_rate", math.nan)):
            self._hit_rates.append(rate)
            self.best_hit_rate = max(self.best_hit_rate or 0.0, self.hit_rate or 0.0)

    def fail(self, text: str) -> None:
        """Keep the first error: the others that follow it, from other ranks and the launcher, come of it."""
        self.failure = self.failure or text

    @property
    def hit_rate(self) -> float | None:
        """Mean of the last lines, because a single line may stand for a few samples only."""
        return sum(self._hit_rates) / len(self._hit_rates) if self._hit_rates else None

    def _watch(self, name: str, value: float, step: int | None) -> None:
        before = self.not_finite.get(name)
        if not math.isfinite(value):
            lines = before.lines + 1 if before else 1
            self.not_finite[name] = NonFinite(name=name, value=value, lines=lines, step=step, now=True)
        elif before and before.now:
            self.not_finite[name] = replace(before, now=False)

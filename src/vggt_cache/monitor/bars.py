"""One progress bar followed over time: how fast it really moves, and when it began anew."""

from __future__ import annotations

from collections import deque

from vggt_cache.monitor.parse import Bar

RECENT_STEPS = 20
RECENT_S = 30
"""The recent speed is taken over at least so many steps and seconds, so that whole seconds weigh little."""
_KEPT = 512
_SHORTEST_S = 2
"""Bars tell whole seconds; over less than this a speed would be a guess."""


class Track:
    """The states of the bar with one total, as far as the recent speed needs them.

    Speeds are differences between states in the log, not the figures that tqdm prints: after a resume those
    count all steps before it as done in the first moment, and are wrong for a long time.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.last: Bar | None = None
        self.runs = 0
        """How often the bar began, as far as it was seen."""
        self._first: Bar | None = None
        self._states: deque[Bar] = deque(maxlen=_KEPT)

    def update(self, bar: Bar) -> bool:
        """Whether this state is news: a further step, or a new beginning."""
        if self.last is None or _began_anew(self.last, bar):
            self.runs += 1
            self._first = None
            self._states.clear()
        elif bar.step <= self.last.step:
            return False  # drawn again, or the bar of another rank that is a little behind
        self.last = bar
        if bar.step > 0:  # after a resume the way from 0 to the first step was not made in this run
            self._first = self._first or bar
            self._states.append(bar)
        return True

    @property
    def finished(self) -> bool:
        return self.last is not None and self.last.step >= self.total

    @property
    def elapsed_s(self) -> int:
        return self.last.elapsed_s if self.last else 0

    @property
    def steps_seen(self) -> int:
        """Steps between the first and the last state of this run that were seen."""
        return self.last.step - self._first.step if self.last and self._first else 0

    def overall_s_per_it(self) -> float | None:
        """Seconds per step since the first step of this run that was seen."""
        return _speed(self._first, self.last)

    def recent_s_per_it(self) -> float | None:
        """Seconds per step over the last RECENT_STEPS steps and RECENT_S seconds, or what there is of them."""
        baseline = None
        for baseline in reversed(self._states):
            if self.last and _is_long(baseline, self.last):
                break
        return _speed(baseline, self.last)


def _began_anew(last: Bar, bar: Bar) -> bool:
    if bar.elapsed_s == 0 and last.elapsed_s > 0:
        return True
    if bar.step == 0 and last.step > 0:
        return True
    return bar.elapsed_s < last.elapsed_s - max(30, last.elapsed_s // 10)


def _is_long(first: Bar, last: Bar) -> bool:
    return last.step - first.step >= RECENT_STEPS and last.elapsed_s - first.elapsed_s >= RECENT_S


def _speed(first: Bar | None, last: Bar | None) -> float | None:
    if first is None or last is None or last.step <= first.step:
        return None
    seconds = last.elapsed_s - first.elapsed_s
    return seconds / (last.step - first.step) if seconds >= _SHORTEST_S else None

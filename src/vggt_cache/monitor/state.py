"""Folds the events of one log, in order, into what is known of the run that it ends with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

from vggt_cache.monitor.parse import Announced, Bar, Ended, Event, Failure, Metrics, events_in
from vggt_cache.monitor.progress import NonFinite, Progress

RECENT_STEPS = 20
RECENT_S = 30
"""The recent speed is taken over at least so many steps and seconds, so that whole seconds weigh little."""
_SHORTEST_S = 2
"""Bars tell whole seconds; over less than this a speed would be a guess."""
_KEPT_STATES = 512
_MOST_TRACKS = 16
_LINES_OF_HIT_RATE = 3


class Track:
    """One run of a progress bar, as far as its speed needs it.

    Speeds are differences between states in the log, not the figures that tqdm prints: after a resume those
    count all steps before it as done in the first moment, and are wrong for a long time.
    """

    def __init__(self, bar: Bar) -> None:
        self.first = self.last = bar
        self._states = deque([bar], maxlen=_KEPT_STATES)

    def add(self, bar: Bar) -> None:
        if self.first.step == 0:  # after a resume the way from there was not made in this run
            self.first = bar
            self._states.clear()
        self.last = bar
        self._states.append(bar)

    def is_left_by(self, bar: Bar) -> bool:
        """Whether this later state of a bar with the same total is of another run."""
        last = self.last
        if (bar.elapsed_s == 0 and last.elapsed_s > 0) or (bar.step == 0 and last.step > 0):
            return True
        return bar.elapsed_s < last.elapsed_s - max(30, last.elapsed_s // 10)

    def known(self) -> dict[str, Any]:
        """What the bar tells, under the names of `Progress`."""
        last, before = self.last, self.last
        for before in reversed(self._states):
            if last.step - before.step >= RECENT_STEPS and last.elapsed_s - before.elapsed_s >= RECENT_S:
                break
        recent = _s_per_it(before, last)
        known: dict[str, Any] = {"step": last.step, "total": last.total, "elapsed_s": last.elapsed_s}
        known |= {"s_per_it": recent, "s_per_it_overall": _s_per_it(self.first, last)}
        if recent:
            known["left_s"] = (last.total - last.step) * recent
        return known


def _s_per_it(first: Bar, last: Bar) -> float | None:
    steps, seconds = last.step - first.step, last.elapsed_s - first.elapsed_s
    return seconds / steps if steps > 0 and seconds >= _SHORTEST_S else None


class LoggedLines:
    """What the lines of one run say, beside its bar. A resumed run begins with new ones."""

    def __init__(self) -> None:
        self._values: dict[str, float] = {}
        """The newest of each number, and means of the hit rate: a single line may stand for a few samples only."""
        self.ended: Ended | None = None
        self.failure: str | None = None
        """The first error since the last step: those after it, of other ranks and the launcher, come of it."""
        self._not_finite: dict[str, NonFinite] = {}
        self._hit_rates: deque[float] = deque(maxlen=_LINES_OF_HIT_RATE)

    def log(self, values: dict[str, float], step: int | None) -> None:
        """Take in one line of metrics; `step` is the last one before it."""
        self._values |= values
        for name in ("loss", "grad_norm"):
            value, before = values.get(name, 0.0), self._not_finite.get(name)
            if not math.isfinite(value):
                lines = before.lines + 1 if before else 1
                self._not_finite[name] = NonFinite(name=name, value=value, lines=lines, step=step, now=True)
            elif before and name in values:
                self._not_finite[name] = replace(before, now=False)
        if math.isfinite(rate := values.get("cache_hit_rate", math.nan)):
            self._hit_rates.append(rate)
            recent = sum(self._hit_rates) / len(self._hit_rates)
            best = max(self._values.get("cache_hit_rate_best", 0.0), recent)
            self._values |= {"cache_hit_rate_recent": recent, "cache_hit_rate_best": best}

    def known(self) -> dict[str, Any]:
        """What the lines tell, under the names of `Progress`."""
        known: dict[str, Any] = dict(self._values)
        rank = known.get("slowest_rank", math.nan)
        known["slowest_rank"] = int(rank) if math.isfinite(rank) else None
        return known | {"not_finite": tuple(self._not_finite.values()), "failure": self.failure}


class TrainingState:
    """The run that a log ends with. Bounded in memory, whatever is folded in."""

    def __init__(self) -> None:
        self.lines = LoggedLines()
        self.progress_at_s: float | None = None
        self._announced = Announced()
        self._tracks: dict[int, Track] = {}
        """By total; the one whose state changed last is the last."""
        self.training: Track | None = None
        self._settled = False
        """Whether lines of metrics have shown which bar is the training's."""
        self._moved: Track | None = None
        """The bar that moved last since a line with a loss."""
        self._training_moved = False
        self._step_at_s: float | None = None

    def read(self, piece: bytes, at_s: float) -> None:
        """Take in a piece of the log, written at `at_s` as near as is known (seconds since 1970)."""
        for event in events_in(piece):
            self.fold(event, at_s)

    def fold(self, event: Event, at_s: float) -> None:
        if isinstance(event, Bar):
            self._fold_bar(event, at_s)
        elif isinstance(event, Metrics):
            self._settle(event)
            self.lines.log(event.values, self.training.last.step if self.training else None)
        elif isinstance(event, Ended):
            self.lines.ended = event
        elif isinstance(event, Failure):
            self.lines.failure = self.lines.failure or event.text
        else:
            said = {name: value for name, value in event._asdict().items() if value}
            if event.cache_dir or event.no_cache:  # what an earlier run in the same log had is over
                said = {"cache_dir": None, "no_cache": None, "coverage": None, **said}
            self._announced = self._announced._replace(**said)

    def progress(self, samples_per_step: int | None = None) -> Progress:
        """What is known now; `samples_per_step` is taken for what the log announces, where it is given."""
        said, ended = self._announced, self.lines.ended
        known = {**self.lines.known(), "total": said.total_steps}
        if self.training:
            known |= self.training.known()
        counted, s_per_it = known.pop("deepspeed_samples_per_s", None), known.get("s_per_it")
        if (per_step := samples_per_step or said.samples_per_step) and s_per_it:
            counted = per_step / s_per_it
        known.setdefault("samples_per_s", counted)  # else the trainer has counted them itself
        if ended:
            known |= {"ended": True, "left_s": 0.0}
            known |= {"train_runtime_s": ended.runtime_s, "train_loss": ended.train_loss}
        known |= {"last_step_at_s": self._step_at_s, "last_progress_at_s": self.progress_at_s}
        return Progress(**known, cache_dir=said.cache_dir, no_cache=said.no_cache, coverage=said.coverage)

    def _fold_bar(self, bar: Bar, at_s: float) -> None:
        before = self._tracks.get(bar.total)
        if before is None or before.is_left_by(bar):
            track = Track(bar)
        elif bar.step > before.last.step:
            track = before
            track.add(bar)
        else:
            return  # drawn again, or the bar of another rank that is a little behind
        self._tracks.pop(bar.total, None)
        self._tracks[bar.total] = track
        self.progress_at_s = at_s
        self._moved = track
        if before is not None and before is self.training:
            self._switch(track)
        if len(self._tracks) > _MOST_TRACKS:
            del self._tracks[next(total for total, old in self._tracks.items() if old is not self.training)]
        self._choose()
        if track is self.training:
            self._step_at_s = at_s
            self._training_moved = True
            self.lines.ended = self.lines.failure = None

    def _choose(self) -> None:
        """The announced total; else what the metrics showed; else the bar that has run for the longest time."""
        total = self._announced.total_steps
        if total is not None and total in self._tracks:
            self._switch(self._tracks[total])
        elif not self._settled:
            bars = (track.last for track in self._tracks.values())
            longest = max(bars, key=lambda bar: (bar.step < bar.total, bar.elapsed_s))
            self._switch(self._tracks[longest.total])

    def _settle(self, metrics: Metrics) -> None:
        """A line with a loss belongs to the bar that moved since the last one.

        Evaluation bars move too, but then no loss is logged until the training's bar has moved again.
        """
        if "loss" not in metrics.values or self._moved is None:
            return
        if not self._training_moved:
            self._announced = self._announced._replace(total_steps=None)
            self._switch(self._moved)
        self._settled = True
        self._training_moved = False
        self._moved = None

    def _switch(self, track: Track) -> None:
        if track is not self.training:
            if self.training is not None:
                self.lines = LoggedLines()
            self.training = track
            self._step_at_s = self.progress_at_s

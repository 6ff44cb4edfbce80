"""Folds the events of one log, in order, into what is known of the run that it ends with."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import replace
from typing import Any

from vggt_cache.monitor.bars import Track
from vggt_cache.monitor.parse import Announced, Bar, CacheNote, Ended, Event, Failure, Metrics
from vggt_cache.monitor.progress import NonFinite, Progress

_MOST_TRACKS = 16
_LINES_OF_HIT_RATE = 3
_SHOWN = (
    *("loss", "grad_norm", "learning_rate", "epoch", "cache_hit_rate", "cache_wait_ms"),
    *("cache_read_mb_per_s", "encode_ms", "slowest_rank_s"),
)


class LoggedLines:
    """What the lines of one run say, beside its bar. A resumed run begins with new ones."""

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


class TrainingState:
    """The run that a log ends with. Bounded in memory, whatever is folded in."""

    def __init__(self) -> None:
        self.lines = LoggedLines()
        self.progress_at_s: float | None = None
        self._tracks: dict[int, Track] = {}
        """By total; the one whose state changed last is the last."""
        self._training: Track | None = None
        self._settled = False
        """Whether lines of metrics have shown which bar is the training's."""
        self._moved: Track | None = None
        self._training_moved = False
        self._step_at_s: float | None = None
        self._total_steps: int | None = None
        self._samples_per_step: int | None = None
        self._cache = CacheNote()

    def fold(self, event: Event, at_s: float) -> None:
        """Take one event in; `at_s` is when it was written, as near as is known (seconds since 1970)."""
        if isinstance(event, Bar):
            self._fold_bar(event, at_s)
        elif isinstance(event, Metrics):
            self._settle(event)
            self.lines.log(event.values, self.training_step)
        elif isinstance(event, Ended):
            self.lines.ended = event
        elif isinstance(event, Failure):
            self.lines.fail(event.text)
        elif isinstance(event, Announced):
            self._total_steps = event.total_steps or self._total_steps
            self._samples_per_step = event.samples_per_step or self._samples_per_step
        else:
            directory = event.directory or self._cache.directory
            self._cache = CacheNote(directory=directory, coverage=event.coverage or self._cache.coverage)

    @property
    def training_step(self) -> int | None:
        return self._training.last.step if self._training and self._training.last else None

    @property
    def steps_seen(self) -> int:
        return self._training.steps_seen if self._training else 0

    # ------------------------------------------------------------ which bar is the training's

    def _fold_bar(self, bar: Bar, at_s: float) -> None:
        track = self._tracks.get(bar.total) or Track(bar.total)
        runs = track.runs
        if not track.update(bar):
            return
        self._tracks.pop(bar.total, None)
        self._tracks[bar.total] = track
        if len(self._tracks) > _MOST_TRACKS:
            self._tracks.pop(
                next(total for total, other in self._tracks.items() if other is not self._training)
            )
        self.progress_at_s = at_s
        self._moved = track
        self._choose()
        if track is self._training:
            self._step_made(at_s, began_again=track.runs > runs > 0)

    def _step_made(self, at_s: float, *, began_again: bool) -> None:
        self._step_at_s = at_s
        self._training_moved = True
        if began_again:
            self.lines = LoggedLines()
        self.lines.ended = None
        self.lines.failure = None

    def _choose(self) -> None:
        """The announced total; else what the metrics showed; else the bar that has run for the longest time."""
        if self._total_steps in self._tracks and self._total_steps is not None:
            self._switch(self._tracks[self._total_steps])
        elif not self._settled:
            self._switch(max(self._tracks.values(), key=lambda track: (not track.finished, track.elapsed_s)))

    def _settle(self, metrics: Metrics) -> None:
        """A line with a loss belongs to the bar that moved since the last one.

        Evaluation bars move too, but then no loss is logged until the training's bar has moved again.
        """
        if "loss" not in metrics.values or self._moved is None:
            return
        if not self._training_moved:
            self._total_steps = None
            self._switch(self._moved)
        self._settled = True
        self._training_moved = False
        self._moved = None

    def _switch(self, track: Track) -> None:
        if track is not self._training:
            if self._training is not None:
                self.lines = LoggedLines()
            self._training = track
            self._step_at_s = self.progress_at_s

    # ------------------------------------------------------------ what is known

    def progress(self, samples_per_step: int | None = None) -> Progress:
        """What is known now; `samples_per_step` is taken for what the log says, where it is given."""
        of_the_bar = self._of_the_bar(samples_per_step or self._samples_per_step)
        return Progress(
            **{**of_the_bar, **self._of_the_lines()},
            last_step_at_s=self._step_at_s,
            last_progress_at_s=self.progress_at_s,
            cache_dir=self._cache.directory,
            coverage=self._cache.coverage,
        )

    def _of_the_bar(self, samples_per_step: int | None) -> dict[str, Any]:
        known: dict[str, Any] = {"total": self._total_steps, "samples_per_s": self._logged_speed()}
        track = self._training
        if track is None or track.last is None:
            return known
        recent, overall = track.recent_s_per_it(), track.overall_s_per_it()
        known |= {"step": track.last.step, "total": track.total, "elapsed_s": track.last.elapsed_s}
        known |= {"s_per_it": recent, "s_per_it_overall": overall}
        if recent:
            known["left_s"] = (track.total - track.last.step) * recent
            if samples_per_step:
                known["samples_per_s"] = samples_per_step / recent
        return known

    def _logged_speed(self) -> float | None:
        values = self.lines.values
        return values.get("samples_per_s", values.get("deepspeed_samples_per_s"))

    def _of_the_lines(self) -> dict[str, Any]:
        lines = self.lines
        known: dict[str, Any] = {name: lines.values.get(name) for name in _SHOWN}
        rank = lines.values.get("slowest_rank")
        known["slowest_rank"] = int(rank) if rank is not None and math.isfinite(rank) else None
        known |= {"cache_hit_rate_recent": lines.hit_rate, "cache_hit_rate_best": lines.best_hit_rate}
        known |= {"not_finite": tuple(lines.not_finite.values()), "failure": lines.failure}
        if lines.ended:
            known |= {"ended": True, "train_runtime_s": lines.ended.runtime_s, "left_s": 0.0}
            known["train_loss"] = lines.ended.train_loss
        return known

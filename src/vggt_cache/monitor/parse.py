"""From one piece of a log (between two line ends or carriage returns) to what it says.

The shapes of lines are those of tqdm, of transformers' Trainer (4.x prints numbers, 5.x prints them as strings), of
DeepSpeed, and of our own trainer. A piece may hold several: bars end without a line end, so whatever is printed next
follows on the same line. Anything that is not understood says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Bar(NamedTuple):
    """A state of a progress bar that has no description: the training's, or an evaluation's."""

    step: int
    total: int
    elapsed_s: int
    """Since the bar was made, which after a resume is not the time since step 0; whole seconds."""


class Metrics(NamedTuple):
    """Known numbers of a line that the trainer logs; they may be nan or infinite."""

    values: dict[str, float]


class Ended(NamedTuple):
    """The line with which the trainer ends."""

    runtime_s: float
    train_loss: float | None


class Announced(NamedTuple):
    """What a trainer says beforehand of the run and of its cache; None where this line does not say it."""

    total_steps: int | None = None
    samples_per_step: int | None = None
    cache_dir: str | None = None
    no_cache: str | None = None
    """What is done instead."""
    coverage: tuple[int, int] | None = None
    """Features that the cache has, features that the data needs."""


class Failure(NamedTuple):
    """An exception or a refusal that was printed."""

    text: str


Event = Bar | Metrics | Ended | Announced | Failure

METRICS = {
    *("loss", "grad_norm", "learning_rate", "epoch", "samples_per_s", "slowest_rank", "slowest_rank_s"),
    *("cache_hit_rate", "cache_staged_rate", "cache_wait_ms", "cache_read_mb_per_s", "encode_ms"),
}

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RANK_LABEL = re.compile(r"^\s*(?:\[(?:default|rank)?\d+\]:|\d+:) ?")  # torchrun --tee, torch, srun --label
_BAR = re.compile(
    r"\d{1,3}%(?:\|[^|]*\|)? +(?P<step>\d{1,12})/(?P<total>\d{1,12}) "
    r"\[(?:(?P<days>\d{1,6}) ?d(?:ays?)?,? ?)?(?:(?P<hours>\d{1,6}):)?(?P<minutes>\d{1,6}):(?P<seconds>\d\d)"
    r"<[^\],]*(?:, \d[^\],]*)?, *[\d.?]+(?:s/it|it/s)[^\]]*\]"
)
_LINE_OF_METRICS = re.compile(r"\{'[^{}]*\}")
_NUMBER = re.compile(r"(?i)'(\w+)': *(?:[\w.]+\()?'?([-+]?(?:\d[\d.]*(?:e[-+]?\d+)?|nan|inf(?:inity)?))\b")
_COUNT = r"(\d[\d,]{0,15})\b"
_BATCH = r"Total (?:train )?batch size(?: \([^)]*\))? *=|\btrain_batch_size \.+"
_ANNOUNCED = {
    "total_steps": re.compile(rf"Total optimization steps *= *{_COUNT}"),
    "samples_per_step": re.compile(rf"(?:{_BATCH}) *{_COUNT}"),
    "cache_dir": re.compile(r"\[INFO\] VGGT feature cache enabled: (.*\S)"),
    "no_cache": re.compile(r"\[INFO\] No feature cache: ([^;]*[^;\s])"),
    "coverage": re.compile(rf"\[INFO\] Coverage of this data set: {_COUNT}/{_COUNT}"),
}
_DEEPSPEED_SPEED = re.compile(r"RunningAvgSamplesPerSec=(\d+(?:\.\d+)?(?:e[-+]?\d+)?)")
_FAILURE = re.compile(r"^(?:\[ERROR\] .*|(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt)(?::.*)?$)")
_SAYS_SOMETHING = re.compile(
    rb"\{'| = |train_batch_size|SamplesPerSec=|\[INFO\] |\[ERROR\]|Error|Exception|Interrupt"
)


def events_in(piece: bytes) -> Iterator[Event]:
    """What a complete piece of a log says, in no particular order. Cheap for pieces that say nothing."""
    yield from bars_in(piece)
    if _SAYS_SOMETHING.search(piece):
        text = _text(piece)
        yield from _logged(text)
        yield from _announced(text)
        line = _RANK_LABEL.sub("", _BAR.split(text)[-1]).strip()  # a bar ends without a line end
        if _FAILURE.match(line):
            yield Failure(text=line.removeprefix("[ERROR] ")[:300])


def bars_in(piece: bytes) -> Iterator[Bar]:
    """The bars alone. They are whole as soon as their closing bracket is there, whatever may follow."""
    if b"s/it" not in piece and b"it/s" not in piece:
        return
    text = _text(piece)
    end = 0
    for found in _BAR.finditer(text):
        # tqdm puts a colon after a description: such a bar counts files or shards, not steps.
        if not text[end : found.start()].rstrip().endswith(":"):
            days, hours, minutes, seconds = (int(part or 0) for part in found.groups()[2:])
            elapsed_s = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
            yield Bar(step=int(found["step"]), total=int(found["total"]), elapsed_s=elapsed_s)
        end = found.end()


def _logged(text: str) -> Iterator[Event]:
    for line in _LINE_OF_METRICS.findall(text):
        values = {name: float(number) for name, number in _NUMBER.findall(line) if number.count(".") <= 1}
        if "train_runtime" in values:
            yield Ended(runtime_s=values["train_runtime"], train_loss=values.get("train_loss"))
        elif not any(name.startswith("eval_") for name in values):
            yield Metrics(values={name: value for name, value in values.items() if name in METRICS})
    if found := _DEEPSPEED_SPEED.search(text):
        yield Metrics(values={"deepspeed_samples_per_s": float(found[1])})


def _announced(text: str) -> Iterator[Announced]:
    for name, pattern in _ANNOUNCED.items():
        if found := pattern.search(text):
            said: list[Any] = list(found.groups())
            if name not in ("cache_dir", "no_cache"):
                said = [int(digits.replace(",", "")) for digits in said]
            value: Any = tuple(said) if name == "coverage" else said[0]
            yield Announced(**{name: value})


def _text(piece: bytes) -> str:
    return _RANK_LABEL.sub("", _ANSI.sub("", piece.decode("utf-8", "replace")))

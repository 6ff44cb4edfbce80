"""Whether frames come in the order in which they were seen: the features of a list depend on it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from vggt_cache.samples.sample import Sample

_NUMBER = re.compile("([0-9]+)")


class OrderWatch:
    """Looks at samples as they pass by; `sentences` says what is odd about them."""

    def __init__(self) -> None:
        self._by_letters = self._gaps = 0
        self._first_list = self._first_gap = ""
        self._step_before = "", 0

    def passing(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        for sample in samples:
            if sample.layout == "episode":
                self._look_for_gap(sample.record["episode"], sample.record["step"])
            elif pair := swapped_by_letters(sample.frames):
                self._by_letters += 1
                self._first_list = self._first_list or f"{sample.source}, {pair[0]!r} before {pair[1]!r}"
            yield sample

    def sentences(self) -> Iterator[str]:
        if self._by_letters:
            yield (
                f"{self._by_letters} lists of frames are in the order of letters, not of numbers (the first: "
                f"{self._first_list}); features of lists depend on the order: sort them as they were seen"
            )
        if self._gaps:
            yield (
                f"{self._gaps} steps of episodes follow one that is not the one before (the first: "
                f"{self._first_gap}); features of lists depend on the frames before: check whether images are missing"
            )

    def _look_for_gap(self, episode: str, step: int) -> None:
        folder, before = self._step_before
        if folder == episode and step != before + 1:
            self._gaps += 1
            self._first_gap = self._first_gap or f"{episode!r}, step {step} after {before}"
        self._step_before = episode, step


def swapped_by_letters(frames: Sequence[str]) -> tuple[str, str] | None:
    """The first pair such as frame_10 before frame_2, in a list that is in the order of letters throughout."""
    if len({*map(len, frames)}) < 2 or any(name > after for name, after in pairwise(frames)):
        return None
    pairs = pairwise(frames)
    return next((pair for pair in pairs if _numbers(pair[0]) > _numbers(pair[1])), None)


def _numbers(path: str) -> list[tuple[int, str]]:
    """What orders paths by the numbers in them; an extension has no part in it."""
    parts = _NUMBER.split(os.path.splitext(path)[0])
    return [(int(part), "") if at % 2 else (0, part) for at, part in enumerate(parts)]

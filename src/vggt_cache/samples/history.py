"""Which earlier frames a step of an episode sees (JanusVLN's sampling)."""

from __future__ import annotations

import math

FRAMES_PER_SAMPLE = 9


def history_indexes(step: int, count: int = FRAMES_PER_SAMPLE) -> list[int]:
    """Indexes of the frames that step `step` sees, oldest first; the last one is `step` itself.

    All of 0..step where these are at most `count`, else `numpy.linspace(0, step, count, dtype=int)`,
    computed with numpy's own float operations (the quotient first) so that every index is the same.
    """
    if step < count:
        return list(range(step + 1))
    if count < 2:
        return [step]
    stride = step / (count - 1)
    return [math.floor(index * stride) for index in range(count - 1)] + [step]


def padded_history_indexes(step: int, count: int = FRAMES_PER_SAMPLE) -> list[int]:
    """The same, always `count` long: a short history repeats the first frame at the front (episode folders)."""
    indexes = history_indexes(step, count)
    return [0] * (count - len(indexes)) + indexes

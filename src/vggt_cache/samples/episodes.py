"""Episode folders: one sample per step, the frames and the action from the names of the images.

    <episode>/milestones_result.json     instruction_text, subinstructions[], completion_checkpoints[]
    <episode>/step_0000_TURN_RIGHT.png   the frame of step 0, at which the action TURN_RIGHT was taken
    <episode>/step_0000_TURN_RIGHT.json  landmark_description, spatial_description

Listing a folder is all that precompute needs. The texts are read when training asks for them.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from vggt_cache.errors import DataError, SmallFileError, errors_as
from vggt_cache.samples.sample import Problem, Sample
from vggt_cache.samples.walk import EPISODE_FILE
from vggt_cache.small_files import read_text

FRAMES_PER_SAMPLE = 9
_STEP_IMAGE = re.compile(r"(step_([0-9]{1,9})_(.+))\.(?:png|jpe?g|webp)", re.IGNORECASE | re.ASCII)
_ANY_STEP_IMAGE = re.compile(r"step_.*\.(?:png|jpe?g|webp)", re.IGNORECASE | re.ASCII)
_MAX_TEXT_BYTES = 16 * 2**20


def history_indexes(step: int, count: int = FRAMES_PER_SAMPLE) -> list[int]:
    """Indexes of the frames that step `step` sees, oldest first; the last one is `step` itself (JanusVLN's sampling).

    All of 0..step where these are at most `count`, else `numpy.linspace(0, step, count, dtype=int)`,
    computed with numpy's own float operations (the quotient first) so that every index is the same.
    """
    if step < count:
        return list(range(step + 1))
    if count < 2:
        return [step]
    stride = step / (count - 1)
    return [math.floor(index * stride) for index in range(count - 1)] + [step]


def list_steps(folder: str) -> tuple[list[str], list[Problem]]:
    """The images of an episode in the order of their steps, and what is wrong with the folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        return [], [
            _of(folder, f"cannot be listed ({error.strerror or error}): check its mode and its mount")
        ]
    problems = [
        _of(folder, f"has an image {name!r} whose name gives no step and action: rename it")
        for name in names
        if _ANY_STEP_IMAGE.fullmatch(name) and not _STEP_IMAGE.fullmatch(name)
    ]
    steps = sorted((int(match[2]), name) for name in names if (match := _STEP_IMAGE.fullmatch(name)))
    if not steps:
        reason = (
            "holds no image called step_<number>_<action>.png (.jpg, .jpeg, .webp), so it gives no sample"
        )
        return [], [*problems, _of(folder, reason)]
    for (number, before), (following, after) in pairwise(steps):
        if number == following:
            reason = f"has two images for step {number} ({before}, {after}): remove one"
            return [], [*problems, _of(folder, reason)]
    return [name for _, name in steps], problems


def _of(folder: str, reason: str) -> Problem:
    return Problem(path=folder, line=0, reason=reason)


def step_sample(folder: str, position: int, name_at: Callable[[int], str]) -> Sample:
    """The sample at a position among the steps of an episode; `name_at` gives the image at a position.

    A short history repeats the first frame at the front. `record` has `episode` (the folder), `step` (the number in the
    image's name), `action` (upper case) and `sidecar` (the path that the step's descriptions have, if there are any).
    """
    match = _STEP_IMAGE.fullmatch(name_at(position))
    assert match is not None, "list_steps gives no other names"
    seen, number = history_indexes(position), int(match[2])
    return Sample(
        frames=tuple([name_at(at) for at in [0] * (FRAMES_PER_SAMPLE - len(seen)) + seen]),
        bases=(folder,),
        source=f"{folder}:{number}",
        record={
            "episode": folder,
            "step": number,
            "action": match[3].upper(),
            "sidecar": os.path.join(folder, f"{match[1]}.json"),
        },
        layout="episode",
    )


# ---------------------------------------------------------------- texts


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeText:
    """What is written about one step. None: the folder does not have it."""

    instruction: str
    subinstruction: str | None
    description_2d: str | None
    description_3d: str | None


def read_episode_text(sample: Sample) -> EpisodeText:
    """The texts of a sample of an episode folder. Raises DataError for a file that cannot be used.

    The sub-instruction is the first one that is not complete yet: at the frame of its checkpoint it is
    complete, so that frame's action belongs to the next one. After the last checkpoint, the last one holds.
    """
    path, sidecar = os.path.join(sample.record["episode"], EPISODE_FILE), sample.record["sidecar"]
    instruction, parts, checkpoints = _milestones(path)
    complete = sum(checkpoint <= sample.record["step"] for checkpoint in checkpoints)
    words = _read_object(sidecar) if os.path.exists(sidecar) else {}
    return EpisodeText(
        instruction=instruction,
        subinstruction=parts[min(complete, len(parts) - 1)] if parts else None,
        description_2d=_text(words, "landmark_description", sidecar),
        description_3d=_text(words, "spatial_description", sidecar),
    )


@lru_cache(maxsize=256)
def _milestones(path: str) -> tuple[str, list[str], list[int]]:
    """Instruction, sub-instructions, and the frames at which these are complete."""
    record = _read_object(path)
    instruction = _text(record, "instruction_text", path)
    if not instruction:
        raise DataError(f"{path} has no instruction_text, so its steps cannot be trained on: add it")
    parts, checkpoints = record.get("subinstructions") or [], record.get("completion_checkpoints") or []
    try:
        frames = [checkpoint["checkpoint_frame_index"] for checkpoint in checkpoints]
        valid = all(type(frame) is int for frame in frames) and all(isinstance(part, str) for part in parts)
    except (TypeError, KeyError):
        valid = False
    if not valid:
        raise DataError(
            f"{path} has subinstructions that are not texts or completion_checkpoints without a whole number "
            "checkpoint_frame_index: correct it"
        )
    return instruction, list(parts), frames


def _text(record: dict[str, Any], field: str, path: str) -> str | None:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{path} has a {type(value).__name__} as {field} where a text is expected: correct it"
        )
    return value


def _read_object(path: str) -> dict[str, Any]:
    try:
        text = read_text(path, _MAX_TEXT_BYTES)
    except SmallFileError as error:
        raise DataError(str(error)) from error
    with errors_as(DataError, f"{path} is not valid JSON", ": correct it", ValueError, RecursionError):
        record = json.loads(text)
    if not isinstance(record, dict):
        raise DataError(f"{path} holds no JSON object: correct it")
    return record

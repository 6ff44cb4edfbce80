"""Episode folders: one sample per step, the frames and the action from the names of the images.

    <episode>/milestones_result.json     instruction_text, subinstructions[], completion_checkpoints[]
    <episode>/step_0000_TURN_RIGHT.png   the frame of step 0, at which the action TURN_RIGHT was taken
    <episode>/step_0000_TURN_RIGHT.json  landmark_description, spatial_description

Listing a folder is all that precompute needs. The texts are read when training asks for them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from vggt_cache.errors import DataError, SmallFileError
from vggt_cache.samples.history import padded_history_indexes
from vggt_cache.samples.sample import Problem, Sample
from vggt_cache.samples.sources import EPISODE_FILE
from vggt_cache.small_files import read_text

_STEP_IMAGE = re.compile(r"(step_([0-9]{1,9})_(.+))\.(?:png|jpe?g|webp)", re.IGNORECASE | re.ASCII)
_ANY_STEP_IMAGE = re.compile(r"step_.*\.(?:png|jpe?g|webp)", re.IGNORECASE | re.ASCII)
_MAX_TEXT_BYTES = 16 * 2**20


def iter_episode(folder: str, on_problem: Callable[[Problem], None]) -> Iterator[Sample]:
    """The steps of one episode in order.

    `record` has `episode` (the folder), `step` (the number in the image's name), `action` (upper case) and
    `sidecar` (the path that the step's descriptions have, if there are any).
    """
    names, problems = list_steps(folder)
    for problem in problems:
        on_problem(problem)
    for position in range(len(names)):
        yield step_sample(folder, position, names.__getitem__)


def list_steps(folder: str) -> tuple[list[str], list[Problem]]:
    """The images of an episode in the order of their steps, and what is wrong with the folder."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        reason = f"cannot be listed ({error.strerror or error}): check its mode and its mount"
        return [], [_of(folder, reason)]
    steps = sorted(_Step.of(match) for name in names if (match := _STEP_IMAGE.fullmatch(name)))
    problems = [
        _of(folder, f"has an image {name!r} whose name gives no step and action: rename it")
        for name in names
        if _ANY_STEP_IMAGE.fullmatch(name) and not _STEP_IMAGE.fullmatch(name)
    ]
    if reason := _complaint(steps):
        return [], [*problems, _of(folder, reason)]
    return [step.name for step in steps], problems


def step_sample(folder: str, position: int, name_at: Callable[[int], str]) -> Sample:
    """The sample at a position among the steps of an episode; `name_at` gives the image at a position."""
    match = _STEP_IMAGE.fullmatch(name_at(position))
    assert match is not None, "list_steps gives no other names"
    frames = tuple([name_at(at) for at in padded_history_indexes(position)])
    return _sample(folder, _Step.of(match), frames)


def _of(folder: str, reason: str) -> Problem:
    return Problem(path=folder, line=0, reason=reason)


def _complaint(steps: Sequence[_Step]) -> str:
    """Why the steps make no episode."""
    if not steps:
        return "holds no image called step_<number>_<action>.png (.jpg, .jpeg, .webp), so it gives no sample"
    for before, after in pairwise(steps):
        if before.number == after.number:
            return f"has two images for step {after.number} ({before.name}, {after.name}): remove one"
    return ""


@dataclass(frozen=True, order=True, slots=True)
class _Step:
    number: int
    name: str
    stem: str
    action: str

    @classmethod
    def of(cls, match: re.Match[str]) -> _Step:
        return cls(int(match[2]), match[0], match[1], match[3].upper())


def _sample(folder: str, step: _Step, frames: tuple[str, ...]) -> Sample:
    return Sample(
        frames=frames,
        bases=(folder,),
        source=f"{folder}:{step.number}",
        record={
            "episode": folder,
            "step": step.number,
            "action": step.action,
            "sidecar": os.path.join(folder, f"{step.stem}.json"),
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Milestones:
    instruction: str
    subinstructions: tuple[str, ...]
    checkpoints: tuple[int, ...]


def read_episode_text(sample: Sample) -> EpisodeText:
    """The texts of a sample of an episode folder. Raises DataError for a file that cannot be used.

    The sub-instruction is the first one that is not complete yet: at the frame of its checkpoint it is
    complete, so that frame's action belongs to the next one. After the last checkpoint, the last one holds.
    """
    milestones = _milestones(os.path.join(sample.record["episode"], EPISODE_FILE))
    sidecar = sample.record["sidecar"]
    words = _read_object(sidecar) if os.path.exists(sidecar) else {}
    return EpisodeText(
        instruction=milestones.instruction,
        subinstruction=_subinstruction(milestones, sample.record["step"]),
        description_2d=_text(words, "landmark_description", sidecar),
        description_3d=_text(words, "spatial_description", sidecar),
    )


def _subinstruction(milestones: _Milestones, step: int) -> str | None:
    if not milestones.subinstructions:
        return None
    complete = sum(checkpoint <= step for checkpoint in milestones.checkpoints)
    return milestones.subinstructions[min(complete, len(milestones.subinstructions) - 1)]


@lru_cache(maxsize=256)
def _milestones(path: str) -> _Milestones:
    record = _read_object(path)
    instruction = _text(record, "instruction_text", path)
    if not instruction:
        raise DataError(f"{path} has no instruction_text, so its steps cannot be trained on: add it")
    parts, checkpoints = record.get("subinstructions") or [], record.get("completion_checkpoints") or []
    try:
        frames = tuple(checkpoint["checkpoint_frame_index"] for checkpoint in checkpoints)
        valid = all(type(frame) is int for frame in frames) and all(isinstance(part, str) for part in parts)
    except (TypeError, KeyError):
        valid = False
    if not valid:
        raise DataError(
            f"{path} has subinstructions that are not texts or completion_checkpoints without a whole number "
            "checkpoint_frame_index: correct it"
        )
    return _Milestones(instruction=instruction, subinstructions=tuple(parts), checkpoints=frames)


def _text(record: dict[str, Any], field: str, path: str) -> str | None:
    value = record.get(field)
    if value is not None and not isinstance(value, str):
        raise DataError(
            f"{path} has a {type(value).__name__} as {field} where a text is expected: correct it"
        )
    return value


def _read_object(path: str) -> dict[str, Any]:
    try:
        record = json.loads(read_text(path, _MAX_TEXT_BYTES))
    except SmallFileError as error:
        raise DataError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): correct it") from error
    if not isinstance(record, dict):
        raise DataError(f"{path} holds no JSON object: correct it")
    return record

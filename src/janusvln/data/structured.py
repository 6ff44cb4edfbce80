"""Structured samples and steps of episode folders: one question, and an answer of up to four lines.

    SUBINSTRUCTION: ...        loss weight subinstruction_weight
    2D_DESCRIPTION: ...        desc2d_weight
    3D_DESCRIPTION: ...        desc3d_weight
    ACTION: TURN_LEFT          action_weight

A line whose text is absent is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from janusvln.data.errors import UnfitSampleError
from janusvln.data.turns import ACTIONS, IMAGE_TAG, NO_ACTION, Dialogue, Segment, Turn, action_class
from vggt_cache.samples import Sample, read_episode_text

SECTIONS = ("SUBINSTRUCTION", "2D_DESCRIPTION", "3D_DESCRIPTION", "ACTION")

_INSTRUCTION = ("instruction", "instruction_text", "full_instruction", "instructions")
_SUBINSTRUCTION = ("subinstruction", "sub_instruction", "sub_instruction_text")
_DESCRIPTION_2D = ("2D_description", "2d_description", "description_2d")
_DESCRIPTION_3D = ("3D_description", "3d_description", "description_3d")
_ACTION = ("action", "action_label", "actions")


def navigation_prompt(instruction: str, frames: int) -> str:
    """The question of a step that sees `frames` frames, the last one being the current view."""
    return (
        "You steer a robot through a building by following an instruction. From what the camera has seen, work out "
        "how much of the instruction is done, and choose the action that comes next.\n"
        f"Earlier views:{IMAGE_TAG * (frames - 1)}\n"
        f"Current view:{IMAGE_TAG}\n"
        f"Instruction: {instruction}\n"
        "Say which part of the instruction is under way, what is seen, how it lies in space, and one action of "
        "MOVE_FORWARD, TURN_LEFT, TURN_RIGHT, STOP."
    )


def read_structured(sample: Sample, weights: Sequence[float]) -> Dialogue:
    """The dialogue of a structured sample. `weights`: of the four `SECTIONS`. Raises UnfitSampleError."""
    record = sample.record
    texts = [_text(record, fields) for fields in (_SUBINSTRUCTION, _DESCRIPTION_2D, _DESCRIPTION_3D)]
    instruction = _text(record, _INSTRUCTION)
    if not instruction:
        raise UnfitSampleError(f"has no instruction (looked for {', '.join(_INSTRUCTION)}): add one")
    return _dialogue(sample, instruction, texts, _action_of(record), weights)


def read_step(sample: Sample, weights: Sequence[float]) -> Dialogue:
    """The dialogue of a step of an episode folder. Raises UnfitSampleError, DataError."""
    text = read_episode_text(sample)
    texts = [text.subinstruction, text.description_2d, text.description_3d]
    instruction = _one_line(text.instruction)
    return _dialogue(sample, instruction, texts, _known_action(sample.record["action"]), weights)


def _dialogue(
    sample: Sample, instruction: str, texts: Sequence[str | None], action: int, weights: Sequence[float]
) -> Dialogue:
    if not sample.frames:
        raise UnfitSampleError(
            "names no image, and the question is about what is seen: name the current view"
        )
    name = ACTIONS[action] if action != NO_ACTION else None
    lines = [
        Segment(f"{section}: {_one_line(text)}", weight)
        for section, text, weight in zip(SECTIONS, (*texts, name), weights, strict=True)
        if text and not text.isspace()
    ]
    # A line break belongs to its line.
    ended = [Segment(f"{line.text}\n", line.weight) for line in lines[:-1]]
    question = Turn("user", (Segment(navigation_prompt(instruction, len(sample.frames))),))
    return Dialogue((question, Turn("assistant", (*ended, *lines[-1:]))), action)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _first(record: Mapping[str, Any], fields: Sequence[str]) -> object:
    """The first of `fields` that holds something; of a list its first entry, as `instructions` has several wordings."""
    for field in fields:
        value = record.get(field)
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and value != "":
            return value
    return None


def _text(record: Mapping[str, Any], fields: Sequence[str]) -> str:
    value = _first(record, fields)
    if value is not None and not isinstance(value, str):
        raise UnfitSampleError(f"has a {type(value).__name__} where {fields[0]} is a text: correct it")
    return _one_line(value or "")


def _action_of(record: Mapping[str, Any]) -> int:
    value = _first(record, _ACTION)
    if value is None:
        return NO_ACTION
    return _known_action(str(value) if type(value) is int or isinstance(value, str) else ascii(value))


def _known_action(name: str) -> int:
    action = action_class(name)
    if action == NO_ACTION:
        raise UnfitSampleError(
            f"has the action {ascii(name)[:60]}, which is not one of {', '.join(ACTIONS)} nor 0 to 3: correct it"
        )
    return action

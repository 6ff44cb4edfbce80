"""What is said in a sample, before it becomes tokens: a conversation, or a question and an answer of up to four lines.

    SUBINSTRUCTION: ...        loss weight subinstruction_weight
    2D_DESCRIPTION: ...        desc2d_weight
    3D_DESCRIPTION: ...        desc3d_weight
    ACTION: TURN_LEFT          action_weight

A line whose text is absent is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vggt_cache.samples import Sample, read_episode_text

IMAGE_TAG = "<image>"
VIDEO_TAG = "<video>"
SYSTEM_MESSAGE = "You are a helpful assistant."
RESERVED = ("<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for image content: in a text they would be taken for places of images."""
SECTIONS = ("SUBINSTRUCTION", "2D_DESCRIPTION", "3D_DESCRIPTION", "ACTION")
ACTIONS = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
"""An action's class is its place here."""
NO_ACTION = -100

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_INSTRUCTION = ("instruction", "instruction_text", "full_instruction", "instructions")
_TEXTS = (
    ("subinstruction", "sub_instruction", "sub_instruction_text"),
    ("2D_description", "2d_description", "description_2d"),
    ("3D_description", "3d_description", "description_3d"),
)
_ACTION = ("action", "action_label", "actions")


class UnfitSampleError(Exception):
    """The reason why a sample cannot be trained on. Never leaves this package: `NavigationDataset` names the sample."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a message whose tokens are learned with one weight."""

    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `role` is `system`, `user` or `assistant`; only the last is learned."""

    role: str
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """The turns of one sample, and the class of the action that its last answer gives (-100: none)."""

    turns: tuple[Turn, ...]
    action: int = NO_ACTION


def read_dialogue(sample: Sample, weights: Sequence[float]) -> Dialogue:
    """The dialogue of any sample. `weights`: of the four `SECTIONS`. Raises UnfitSampleError, DataError."""
    if sample.layout == "conversation":
        return read_conversation(sample.record)
    return read_step(sample, weights) if sample.layout == "episode" else read_structured(sample, weights)


def check_dialogue(dialogue: Dialogue, frames: int) -> None:
    """Raises UnfitSampleError where texts and frames do not belong together, or there is nothing to learn."""
    for token in RESERVED:
        if any(token in turn.text for turn in dialogue.turns):
            raise UnfitSampleError(
                f"has {token} in a text, where it would stand for an image: write {IMAGE_TAG}"
            )
    questions = "".join(turn.text for turn in dialogue.turns if turn.role == "user")
    if VIDEO_TAG in questions:
        raise UnfitSampleError(
            f"has a {VIDEO_TAG} tag, and videos are not read: name the video's frames in images, and write one "
            f"{IMAGE_TAG} for each"
        )
    tags = questions.count(IMAGE_TAG)
    if tags != frames:
        raise UnfitSampleError(
            f"has {tags} {IMAGE_TAG} tags in its questions but names {frames} frames: each frame "
            "needs one tag, in order"
        )
    given = [turn for turn in dialogue.turns if turn.role == "assistant"]
    answers = [segment for turn in given for segment in turn.segments]
    if not any(segment.weight > 0 for segment in answers):
        raise UnfitSampleError(
            "has no answer to learn from, so training on it does nothing: complete or remove it"
        )
    if any(not turn.text.strip() for turn in given):
        raise UnfitSampleError(
            "has an empty answer, from which the model would learn to say nothing: complete or remove it"
        )


def action_class(name: str) -> int:
    """The class of an action's name in any case, or of its number as text; -100 for anything else."""
    known = name.strip().upper()
    if known in ACTIONS:
        return ACTIONS.index(known)
    return int(known) if known in ("0", "1", "2", "3") else NO_ACTION


# ---------------------------------------------------------------- conversations, as JanusVLN's trainer understands them


def read_conversation(record: Mapping[str, Any]) -> Dialogue:
    """The dialogue of a record with `conversations`. Raises UnfitSampleError.

    A message is `{"from", "value"}` or `{"role", "content"}`. In the very first message a line break directly behind an
    image tag is removed, and if it is the assistant's, it is left out: both as the published trainer does.
    """
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise UnfitSampleError(
            "has no messages in conversations, so there is nothing to learn: complete or remove it"
        )
    if record.get("video"):
        raise UnfitSampleError("names a video, which is not read: name its frames in images")
    turns = [_turn(message, number) for number, message in enumerate(messages)]
    if turns[0].role == "assistant":
        del turns[0]
    answers = [turn.text.strip().upper() for turn in turns if turn.role == "assistant"]
    # Here, unlike in a structured sample, a bare number is a text and no action.
    action = ACTIONS.index(answers[-1]) if answers and answers[-1] in ACTIONS else NO_ACTION
    return Dialogue(tuple(turns), action)


def _turn(message: object, number: int) -> Turn:
    named = message if isinstance(message, Mapping) else {}
    role, text = named.get("role", named.get("from")), named.get("content", named.get("value"))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise UnfitSampleError(
            f"has a message (number {number + 1}) without text, or from an unknown speaker ({ascii(role)[:40]}): give "
            f"it a value, and from one of {', '.join(_ROLES)}"
        )
    return Turn(_ROLES[role], (Segment(text.replace(f"{IMAGE_TAG}\n", IMAGE_TAG) if number == 0 else text),))


# ---------------------------------------------------------------- structured samples and steps of episode folders


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
    if "messages" in record:
        raise UnfitSampleError(
            "keeps its dialogue in messages, which is not read: rename the field to conversations"
        )
    texts = [_text(record, fields) for fields in _TEXTS]
    instruction = _text(record, _INSTRUCTION)
    if not instruction:
        raise UnfitSampleError(f"has no instruction (looked for {', '.join(_INSTRUCTION)}): add one")
    named = _first(record, _ACTION)
    return _step(sample, instruction, texts, NO_ACTION if named is None else _action(named), weights)


def read_step(sample: Sample, weights: Sequence[float]) -> Dialogue:
    """The dialogue of a step of an episode folder. Raises UnfitSampleError, DataError."""
    text = read_episode_text(sample)
    texts = [text.subinstruction, text.description_2d, text.description_3d]
    return _step(sample, _one_line(text.instruction), texts, _action(sample.record["action"]), weights)


def _step(
    sample: Sample, instruction: str, texts: Sequence[str | None], action: int, weights: Sequence[float]
) -> Dialogue:
    if not sample.frames:
        raise UnfitSampleError(
            "names no image, and the question is about what is seen: name the current view"
        )
    name = ACTIONS[action] if action != NO_ACTION else None
    lines = [
        (f"{section}: {_one_line(text)}", weight)
        for section, text, weight in zip(SECTIONS, (*texts, name), weights, strict=True)
        if text and not text.isspace()
    ]
    # A line break belongs to the line that it ends.
    answer = [Segment(f"{line}\n", weight) for line, weight in lines[:-1]]
    answer += [Segment(*line) for line in lines[-1:]]
    question = Segment(navigation_prompt(instruction, len(sample.frames)))
    return Dialogue((Turn("user", (question,)), Turn("assistant", tuple(answer))), action)


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


def _action(value: object) -> int:
    name = str(value) if type(value) is int or isinstance(value, str) else ascii(value)
    action = action_class(name)
    if action == NO_ACTION:
        raise UnfitSampleError(
            f"has the action {ascii(name)[:60]}, which is not one of {', '.join(ACTIONS)} nor 0 to 3: correct it"
        )
    return action

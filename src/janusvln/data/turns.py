"""What is said in a sample, before it becomes tokens."""

from __future__ import annotations

from dataclasses import dataclass

from janusvln.data.errors import UnfitSampleError

IMAGE_TAG = "<image>"
SYSTEM_MESSAGE = "You are a helpful assistant."
RESERVED = ("<|image_pad|>", "<|video_pad|>")
"""Tokens that stand for image content: in a text they would be taken for places of images."""

ACTIONS = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
"""An action's class is its place here."""
NO_ACTION = -100


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


def check_dialogue(dialogue: Dialogue, frames: int) -> None:
    """Raises UnfitSampleError where texts and frames do not belong together, or there is nothing to learn."""
    for turn in dialogue.turns:
        for token in RESERVED:
            if token in turn.text:
                raise UnfitSampleError(
                    f"has {token} in a text, where it would stand for an image: write {IMAGE_TAG}"
                )
    tags = sum(turn.text.count(IMAGE_TAG) for turn in dialogue.turns if turn.role == "user")
    if tags != frames:
        raise UnfitSampleError(
            f"has {tags} {IMAGE_TAG} tags in its questions but names {frames} frames: each frame "
            "needs one tag, in order"
        )
    answers = [segment for turn in dialogue.turns if turn.role == "assistant" for segment in turn.segments]
    if not any(segment.weight > 0 for segment in answers):
        raise UnfitSampleError(
            "has no answer to learn from, so training on it does nothing: complete or remove it"
        )


def action_class(name: str) -> int:
    """The class of an action's name in any case, or of its number as text; -100 for anything else."""
    known = name.strip().upper()
    if known in ACTIONS:
        return ACTIONS.index(known)
    return int(known) if known in ("0", "1", "2", "3") else NO_ACTION

"""Conversation samples, as JanusVLN's trainer understands them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from janusvln.data.errors import UnfitSampleError
from janusvln.data.turns import ACTIONS, IMAGE_TAG, NO_ACTION, Dialogue, Segment, Turn

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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
    kept = turns[1:] if turns[0].role == "assistant" else turns
    return Dialogue(tuple(kept), _action(kept))


def _turn(message: object, number: int) -> Turn:
    named = message if isinstance(message, Mapping) else {}
    role, text = named.get("role", named.get("from")), named.get("content", named.get("value"))
    if not isinstance(role, str) or role not in _ROLES or not isinstance(text, str):
        raise UnfitSampleError(
            f"has a message (number {number + 1}) without text, or from an unknown speaker ({ascii(role)[:40]}): give "
            f"it a value, and from one of {', '.join(_ROLES)}"
        )
    if number == 0:
        text = text.replace(f"{IMAGE_TAG}\n", IMAGE_TAG)
    return Turn(_ROLES[role], (Segment(text),))


def _action(turns: list[Turn]) -> int:
    """The class of the last answer, where that is the name of an action and nothing else."""
    answers = [turn.text.strip().upper() for turn in turns if turn.role == "assistant"]
    return ACTIONS.index(answers[-1]) if answers and answers[-1] in ACTIONS else NO_ACTION

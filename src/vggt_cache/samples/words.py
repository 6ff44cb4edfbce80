"""How long a sample's text is, counted cheaply."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WORDS_PER_FRAME = 252
"""What one frame counts when samples are grouped by length, as in the field's trainers."""

_NO_TEXT = frozenset({"id", "data_path", "images", "image", "history_images", "current_image"})


def word_count(record: Mapping[str, Any]) -> int:
    """Words of the turns of a conversation; without one, words of the record's texts. Never raises."""
    turns = record.get("conversations")
    if isinstance(turns, list):
        return sum(_words(turn.get("value", turn.get("content"))) for turn in turns if isinstance(turn, dict))
    return sum(_words(value) for field, value in record.items() if field not in _NO_TEXT)


def _words(value: object) -> int:
    return len(value.split()) if isinstance(value, str) else 0

"""What one training sample is, whatever layout it came from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

SAMPLE_FIELDS = frozenset({"images", "image", "history_images", "current_image", "conversations"})
"""An object with none of these fields is no sample."""

_TAG = re.compile("<image>|<video>")
MAX_NAME_CHARS = 4096
"""No path is longer on Linux (PATH_MAX)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """An ordered list of frames, and what the annotation says about it."""

    frames: tuple[str, ...]
    """Names as written, oldest first; the last one is the current view. Empty: a sample of text only."""
    bases: tuple[str, ...]
    """Folders that a relative name is looked for in, in this order."""
    source: str
    """Where it was read, such as `train.jsonl:17`: a line, the number of an item, or a step."""
    record: dict[str, Any]
    """The annotation as it stands in the file; for a step of an episode folder see `episodes`."""
    layout: str
    """`conversation`, `structured` or `episode`"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something in the data that cannot be used; the rest is read all the same."""

    path: str
    """The annotation file or folder."""
    line: int
    """Line of a JSON Lines file, item of a JSON list (both from 1), or 0 for the whole."""
    reason: str

    @property
    def where(self) -> str:
        """`path:line`, or the path alone."""
        return f"{self.path}:{self.line}" if self.line else self.path


class UnusableSampleError(ValueError):
    """The reason why a record is no sample. Never leaves this package."""


def frame_names(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of a record's frames in order. Absent, null and empty fields are the same.

    `images` comes before `image`, and both before `history_images` with `current_image`.
    """
    for field in ("images", "image"):
        if names := _names(record, field):
            return names
    history, current = _names(record, "history_images"), _names(record, "current_image")
    if history and not current:
        raise UnusableSampleError("has history_images but no current_image: name the current view")
    if len(current) > 1:
        raise UnusableSampleError(f"names {len(current)} images as current_image: there is one current view")
    return history + current


def checked_name(name: object, field: str) -> str:
    """A name that a file can have; anything else is refused before it reaches the operating system.

    `{"path": name}`, with whatever beside it, is a name too.
    """
    if isinstance(name, dict) and isinstance(name.get("path"), str):
        name = name["path"]
    if not isinstance(name, str):
        raise UnusableSampleError(
            f"has {type(name).__name__} {_short(name)} in {field}: expected a file name"
        )
    if not name:
        raise UnusableSampleError(f"has an empty name in {field}: remove it or name the file")
    if len(name) > MAX_NAME_CHARS:
        raise UnusableSampleError(
            f"has a name of {len(name)} characters in {field}, over the limit of {MAX_NAME_CHARS}"
        )
    if "\0" in name or not (name.isascii() or _is_encodable(name)):
        raise UnusableSampleError(f"has {_short(name)} in {field}, which cannot be a file name: correct it")
    return name


def is_sample(record: object) -> bool:
    """Whether a record has a field that samples have."""
    return isinstance(record, dict) and not SAMPLE_FIELDS.isdisjoint(record)


def check_text_only(record: Mapping[str, Any]) -> None:
    """Raises UnusableSampleError for a record without frames that speaks of some: they would be lost without a word."""
    spoken = next((field for field in ("video", "videos") if record.get(field)), "")
    turns = record.get("conversations")
    for turn in turns if isinstance(turns, list) else ():
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if isinstance(text, str) and (tag := _TAG.search(text)):
            spoken = tag[0]
    if spoken:
        raise UnusableSampleError(
            f"has {spoken} but names no frame (its fields: {fields_text(record)}): name its frames in images; videos "
            "are not read"
        )


def fields_text(names: Iterable[str]) -> str:
    """The first few names of fields."""
    shown = [ascii(name)[1:-1][:40] for name in islice(names, 9)]
    return ", ".join([*shown[:8], *["..."] * (len(shown) > 8)])


# ---------------------------------------------------------------- how long it is

WORDS_PER_FRAME = 252
"""What one frame counts when samples are grouped by length, as in the field's trainers."""

_NO_TEXT = frozenset({"id", "data_path", "images", "image", "history_images", "current_image"})


def text_length(record: Mapping[str, Any]) -> int:
    """Words of the turns of a conversation; without one, words of the record's texts. Never raises."""
    turns = record.get("conversations")
    if isinstance(turns, list):
        return sum(
            _words_of(turn.get("value", turn.get("content"))) for turn in turns if isinstance(turn, dict)
        )
    return sum(_words_of(value) for field, value in record.items() if field not in _NO_TEXT)


def _words_of(value: object) -> int:
    return len(value.split()) if isinstance(value, str) else 0


def _names(record: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = record.get(field)
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple([checked_name(name, field) for name in value])
    return (checked_name(value, field),)


def _is_encodable(name: str) -> bool:
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Numbers that come from the environment: read when they are needed, refused in one sentence; and sizes as text."""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress

from vggt_cache.errors import SettingsError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?(?:([kmgt])(i?b)?|b)?", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)


def size_of(name: str, default_bytes: int) -> int:
    """Bytes, as `bytes_in` reads them. Raises SettingsError."""
    if not (text := _text(name)):
        return default_bytes
    if size_bytes := bytes_in(text):
        return size_bytes
    raise _refusal(name, text, "a size: give bytes, or a number with a unit, as in 256M")


def bytes_in(text: str) -> int:
    """A size as dd writes it: `268435456`, `256M` or `256MiB`, `0.25G`; `256MB` are 256 * 10^6. 0 where it is none."""
    if not (match := _SIZE.fullmatch(text)):
        return 0
    number, unit, ending = match.groups()
    factor = 1000 if ending and ending.lower() == "b" else 1024
    return int(float(number) * factor ** " kmgt".index(unit.lower() if unit else " "))


def seconds_of(name: str, default_s: float) -> float:
    """Seconds, more than 0. Raises SettingsError."""
    if not (text := _text(name)):
        return default_s
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise _refusal(name, text, "a number of seconds: give one, as in 60")


def rank_of(name: str, default: int) -> int:
    """A launcher's whole number, 0 or more: RANK, WORLD_SIZE, LOCAL_RANK. Raises SettingsError."""
    if not (text := _text(name)):
        return default
    if _WHOLE.fullmatch(text):
        return int(text)
    raise _refusal(name, text, "a whole number: a launcher sets it; unset it for a process alone")


def _text(name: str) -> str:
    return os.environ.get(name, "").strip()


def _refusal(name: str, text: str, wanted: str) -> SettingsError:
    return SettingsError(f"the environment's {name} is {text!r}, which is not {wanted}")

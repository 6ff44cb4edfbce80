"""Numbers that come from the environment: read when they are needed, refused in one sentence."""

from __future__ import annotations

import os
import re

from vggt_cache.errors import SettingsError

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) ?(?:([kmgt])(i?b)?|b)?", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"\d{1,9}", re.ASCII)


def size_of(name: str, default_bytes: int) -> int:
    """Bytes, at least 1, as dd writes them: `268435456`, `256M` or `256MiB`, `0.25G`; `256MB` are 256 * 10^6.

    Raises SettingsError.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default_bytes
    match = _SIZE.fullmatch(text)
    if match is None or (size_bytes := int(float(match[1]) * _factor(match[2], match[3]))) < 1:
        raise SettingsError(
            f"the environment's {name} is {text!r}, which is not a size: give bytes, or a number with a unit, "
            "as in 256M"
        )
    return size_bytes


def seconds_of(name: str, default_s: float) -> float:
    """Seconds, more than 0. Raises SettingsError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default_s
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SettingsError(
            f"the environment's {name} is {text!r}, which is not a number of seconds: give one, as in 60"
        )
    return seconds


def rank_of(name: str, default: int) -> int:
    """A launcher's whole number, 0 or more: RANK, WORLD_SIZE, LOCAL_RANK. Raises SettingsError."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if _WHOLE.fullmatch(text) is None:
        raise SettingsError(
            f"the environment's {name} is {text!r}, which is not a whole number: a launcher sets it; unset it for a "
            "process alone"
        )
    return int(text)


def _factor(unit: str | None, ending: str | None) -> int:
    """K and KiB are 1024, KB is 1000."""
    power = " kmgt".index(unit.lower()) if unit else 0
    return int((1000 if ending and ending.lower() == "b" else 1024) ** power)

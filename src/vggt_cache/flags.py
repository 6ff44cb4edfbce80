"""Flags made from a settings dataclass: name, type, default, help and choices of each stand there, once.

A flag that is not given is absent from the parsed namespace, so that one which was given is known as such even where
its value is the default.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field, fields
from typing import Any

from vggt_cache.errors import SettingsError


def flag(
    default: Any = MISSING,
    *,
    help: str,
    choices: Iterable[str] = (),
    metavar: str | None = None,
    required: bool = True,
) -> Any:
    """A dataclass field that is also a flag, of its default's type, and a text where there is none.

    `required`: on the command line too, where there is no default.
    """
    about = {"help": help, "choices": tuple(choices), "metavar": metavar, "required": required}
    return field(default=default, metadata=about)


def add_flags(
    add: Callable[..., argparse.Action],
    settings: type,
    *,
    only: Iterable[str] | None = None,
    defaults: bool = True,
) -> None:
    """Give each field, or those in `only`, to `add(name, **options)`. `defaults`: whether the help shows them."""
    for entry in fields(settings):
        if only is not None and entry.name not in only:
            continue
        text = entry.metadata["help"].replace("%", "%%")
        if defaults and entry.default is not MISSING:
            text += default_text(entry.default)
        options = {"help": text, **_options(entry.default)}
        options |= {name: entry.metadata[name] for name in ("choices", "metavar") if entry.metadata[name]}
        if entry.default is MISSING and entry.metadata["required"]:
            options["required"] = True
        add(entry.name, **options).default = argparse.SUPPRESS


def default_text(default: object) -> str:
    """What the help says of a default. What is off, or empty, where nothing is given goes without saying."""
    return (
        "" if default is None or default is False else f" (default: {'on' if default is True else default})"
    )


def _options(default: Any) -> dict[str, Any]:
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    return {"type": str if default in (MISSING, None) else type(default)}


def check_choices(settings: Any) -> None:
    """Raises SettingsError for a value that is none of its field's choices."""
    for entry in fields(settings):
        value, choices = getattr(settings, entry.name), entry.metadata["choices"]
        if choices and value not in choices:
            raise SettingsError(
                f"--{entry.name} {value!r} is none of {', '.join(choices)}: choose one of these"
            )


def choices_of(settings: type, name: str) -> tuple[str, ...]:
    """What a field may be; nothing where it may be anything of its type."""
    choices: tuple[str, ...] = _about(settings, name)["choices"]
    return choices


def help_of(settings: type, name: str) -> str:
    return str(_about(settings, name)["help"])


def _about(settings: type, name: str) -> Mapping[str, Any]:
    return next(entry.metadata for entry in fields(settings) if entry.name == name)

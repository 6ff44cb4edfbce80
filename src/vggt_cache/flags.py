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
    kind: type = str,
    choices: Iterable[str] = (),
    metavar: str | None = None,
    required: bool = True,
) -> Any:
    """A dataclass field that is also a flag, of its default's type, and of `kind` where there is none.

    `required`: on the command line too, where there is no default.
    """
    about = {"help": help, "kind": kind, "choices": tuple(choices), "metavar": metavar, "required": required}
    return field(default=default, metadata=about)


def add_flags(
    add: Callable[..., argparse.Action],
    settings: type,
    *,
    only: Iterable[str] | None = None,
    defaults: bool = True,
) -> None:
    """Give each flag, or those in `only`, to `add(name, **options)`. `defaults`: whether the help shows them."""
    for entry in fields(settings):
        about, default = entry.metadata, entry.default
        if not about or (only is not None and entry.name not in only):
            continue
        text = about["help"].replace("%", "%%") + default_text(default if defaults else None)
        options = {name: about[name] for name in ("choices", "metavar") if about[name]}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction if default else "store_true"
        else:
            options["type"] = about["kind"] if default in (MISSING, None) else type(default)
        if default is MISSING and about["required"]:
            options["required"] = True
        add(entry.name, help=text, **options).default = argparse.SUPPRESS


def default_text(default: object) -> str:
    """What the help says of a default. What is off, or empty, where nothing is given goes without saying."""
    if default is None or default is False or default is MISSING:
        return ""
    return f" (default: {'on' if default is True else default})"


def check_choices(settings: Any) -> None:
    """Raises SettingsError for a value that is none of its field's choices."""
    for entry in fields(settings):
        value, choices = getattr(settings, entry.name), entry.metadata["choices"]
        if choices and value not in choices:
            raise SettingsError(
                f"--{entry.name} {value!r} is none of {', '.join(choices)}: choose one of these"
            )


def about_flag(settings: type, name: str) -> Mapping[str, Any]:
    """What `flag` was told of a field: its help, its choices (empty where it may be anything of its type)."""
    return next(entry.metadata for entry in fields(settings) if entry.name == name)

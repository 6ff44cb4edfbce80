"""What is printed: names of files are bytes, and not every terminal and log can show every one of them.

And a progress bar ends without a line end, so that whatever is printed next would stand behind it, on the same line.
"""

from __future__ import annotations

import io
import json
import re
import sys
from typing import Any, TextIO

_MISLEADING = re.compile(r"^\s|\s$|[\\'\"]|^$")
_bar_is_drawn = False


def print_any_name() -> None:
    """Let stdout and stderr write as `\\udcff` or `\\u524d` what they cannot write as it is, instead of raising.

    To be called once, where a command begins. A file's name that is no UTF-8, or one in Chinese in a log that is ASCII,
    must not end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def expect_bar(drawn: bool) -> None:
    """Whether a process of this run, perhaps another one, draws a bar into the terminal and the log of this one."""
    global _bar_is_drawn
    _bar_is_drawn = drawn


def print_line(level: str, text: str, stream: TextIO | None = None) -> None:
    """`[LEVEL] text` on a line of its own, on stdout unless said otherwise.

    In one piece: several processes may say something at the same moment, into the same log.
    """
    stream = stream or sys.stdout
    begin = "\n" if _bar_is_drawn else ""
    stream.write(f"{begin}[{level}] {text}\n")
    stream.flush()


def name_text(name: str) -> str:
    """A file's name where a line begins with it: as it stands, in quotes where it could be taken for another.

    Blanks at its ends, quotes, backslashes and what cannot be printed would not be seen otherwise, or break the line.
    """
    return name if name.isprintable() and not _MISLEADING.search(name) else repr(name)


def json_line(entry: dict[str, Any]) -> bytes:
    """A line of a JSON Lines file that people read too: names as they are, unless they are no UTF-8."""
    try:
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(entry).encode() + b"\n"

"""What is printed: names of files are bytes, and not every terminal and log can show every one of them."""

from __future__ import annotations

import io
import sys


def print_any_name() -> None:
    """Let stdout and stderr write as `\\udcff` or `\\u524d` what they cannot write as it is, instead of raising.

    To be called once, where a command begins. A file's name that is no UTF-8, or one in Chinese in a log that is ASCII,
    must not end a run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

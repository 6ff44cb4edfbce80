"""JSON Lines and JSON lists of any size, read record by record in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import IO, Any

from vggt_cache.samples.sample import Problem

MAX_RECORD_CHARS = 16 * 1024 * 1024
_CHUNK_CHARS = 1024 * 1024
_SPACE = re.compile(r"[ \t\n\r]*")

Records = Iterator[tuple[int, Any]]
"""(line number in a JSON Lines file, or position in a list counted from 1; the parsed value)"""


def iter_json_lines(path: str, on_problem: Callable[[Problem], None]) -> Records:
    """One record a line. A bad line costs that line; an unreadable file the rest of it."""
    try:
        with open(path, "rb") as file:
            number = 0
            while line := file.readline(MAX_RECORD_CHARS + 1):
                number += 1
                if len(line) > MAX_RECORD_CHARS:
                    on_problem(
                        Problem(where=f"{path}:{number}", reason=f"line over {MAX_RECORD_CHARS} bytes")
                    )
                    _skip_line(file)
                    continue
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not text.strip():
                    continue
                try:
                    record = json.loads(text)
                except (ValueError, RecursionError) as error:
                    on_problem(Problem(where=f"{path}:{number}", reason=f"not valid JSON ({error})"))
                    continue
                yield number, record
    except OSError as error:
        on_problem(Problem(where=path, reason=f"cannot be read ({error.strerror})"))


def iter_json_list(path: str, on_problem: Callable[[Problem], None]) -> Records:
    """The elements of a list. Where the list breaks, what came before stands and the rest is one problem."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            yield from _elements(file, path, on_problem)
    except UnicodeDecodeError as error:
        on_problem(Problem(where=path, reason=f"not UTF-8 ({error.reason}); what follows is not read"))
    except OSError as error:
        on_problem(Problem(where=path, reason=f"cannot be read ({error.strerror})"))


def _skip_line(file: IO[bytes]) -> None:
    while (rest := file.readline(_CHUNK_CHARS)) and not rest.endswith(b"\n"):
        pass


def _elements(file: IO[str], path: str, on_problem: Callable[[Problem], None]) -> Records:
    decoder = json.JSONDecoder()
    buffer, at, number = file.read(_CHUNK_CHARS), 0, 0
    expected = "["
    while True:
        at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
        if at >= len(buffer) and (more := file.read(_CHUNK_CHARS)):
            buffer, at = more, 0
            continue
        mark = buffer[at : at + 1]
        if mark == "]" and expected != "[":
            return
        if expected in ("[", ","):
            if mark != expected:
                reason = (
                    f"not a JSON list: {expected!r} expected after element {number}; what follows is not read"
                )
                on_problem(Problem(where=f"{path}:{number + 1}", reason=reason))
                return
            at, expected = at + 1, "element"
            continue
        try:
            value, end = decoder.raw_decode(buffer, at)
            if end == len(buffer) and (more := file.read(_CHUNK_CHARS)):
                buffer, at = buffer[at:] + more, 0  # a number at the very end may go on
                continue
        except (ValueError, RecursionError) as error:
            more = file.read(max(_CHUNK_CHARS, len(buffer) - at))
            if more and len(buffer) - at < MAX_RECORD_CHARS and not isinstance(error, RecursionError):
                buffer, at = buffer[at:] + more, 0
                continue
            reason = f"not valid JSON ({error}); what follows is not read"
            on_problem(Problem(where=f"{path}:{number + 1}", reason=reason))
            return
        number, at, expected = number + 1, end, ","
        yield number, value

"""JSON Lines files and JSON lists, read as streams of records: memory does not grow with the file.

Nothing is trusted: text that is not UTF-8, values that are not JSON (`NaN`), nesting without end and
objects without end are each told with their place, and reading goes on behind them where that is possible.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

MAX_RECORD_BYTES = 16 * 2**20
"""Of one sample. Bounds the memory that a file without line ends, or without closing brackets, can take."""
MAX_NESTING = 100
"""Lists and objects in each other. Python's own limit depends on who calls: the same file would be read or not."""
_CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a JSON Lines file, or one item of a JSON list: a record, or the reason why there is none."""

    number: int
    record: dict[str, Any] | None
    reason: str = ""
    offset: int = 0
    """Where a record begins in its file, in bytes."""
    length: int = 0
    """Bytes of a record; 0 where there is none."""

    def at(self, offset: int, length: int) -> Entry:
        """The same, with its place in the file."""
        return (
            Entry(self.number, self.record, self.reason, offset, length) if self.record is not None else self
        )


# ---------------------------------------------------------------- JSON Lines


def iter_json_lines(file: IO[bytes]) -> Iterator[Entry]:
    """One record a line; `number` is the line's, from 1. Blank lines are passed over."""
    values = _Values()
    number = offset = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        length = len(line)
        if length > MAX_RECORD_BYTES:
            length += _skip_line(file, line)
            yield Entry(
                number, None, f"is longer than {MAX_RECORD_BYTES} bytes: no sample is; check the file"
            )
        elif not line.isspace():
            yield from _read_line(values, number, line, offset)
        offset += length


def _read_line(values: _Values, number: int, line: bytes, offset: int) -> Iterator[Entry]:
    text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    if text and not text.isspace():
        yield _parsed_line(values, number, text).at(offset + len(line) - len(text), len(text))


def _parsed_line(values: _Values, number: int, line: bytes) -> Entry:
    try:
        return values.whole(number, line.decode("utf-8"))
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 text (byte {error.start + 1} of the line): convert the file to UTF-8"
        return Entry(number, None, reason)


def _skip_line(file: IO[bytes], part: bytes) -> int:
    """Read on to the end of the line; returns how many bytes that took."""
    skipped = 0
    while part and not part.endswith(b"\n"):
        part = file.readline(_CHUNK_BYTES)
        skipped += len(part)
    return skipped


def parse_line(data: bytes, number: int) -> Entry:
    """The line that `iter_json_lines` found at an entry's place, once more."""
    return _parsed_line(_Values(), number, data)


# ---------------------------------------------------------------- JSON lists


def iter_json_list(file: IO[bytes]) -> Iterator[Entry]:
    """The items of a list; `number` counts them from 1. Behind a syntax error nothing can be read: it ends there."""
    window, values = _Window(file), _Values()
    if window.next_character() != "[":
        yield Entry(0, None, "is not a JSON list: expected [ at its beginning")
        return
    window.at += 1
    number = 0
    if window.next_character() == "]":
        return
    while True:
        number += 1
        entry, goes_on = window.take(values, number)
        yield entry
        if not goes_on:
            return
        separator = window.next_character()
        if separator == "]":
            return
        if separator != ",":
            yield Entry(
                number + 1, None, f"and everything after it cannot be read: {_instead_of_comma(separator)}"
            )
            return
        window.at += 1


def parse_item(data: bytes, number: int) -> Entry:
    """The item that `iter_json_list` found at an entry's place, once more."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        entry, end = _Values().first(number, text, 0)
    except (ValueError, RecursionError) as error:
        return Entry(number, None, f"is not valid JSON ({error})")
    return entry if end == len(text) else Entry(number, None, "is not one JSON value")


def _instead_of_comma(found: str) -> str:
    if not found:
        return "the file ends before its list does; make it again"
    return f"expected a comma or ] before it, not {found!a}; correct the file"


class _Window:
    """The part of a file's text that is being parsed: from `at` to the end of what has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.at = 0
        self._file = file
        self._text = ""
        self._counted = 0
        self._offset = 0
        self._ended = False
        # Bytes that are no text become lone surrogates, so that only the items that hold them are lost.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")

    def next_character(self) -> str:
        """Go to the next character that is not white space; "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read_on()

    def take(self, values: _Values, number: int) -> tuple[Entry, bool]:
        """Parse one item and go behind it; also whether there is a behind."""
        self.next_character()
        start = self._byte_offset()
        while True:
            length = len(self._text) - self.at
            try:
                entry, end = values.first(number, self._text, self.at)
            except RecursionError:
                return _lost(number, "it is nested too deeply"), False
            except ValueError as error:
                if self._ended:
                    return _lost(number, f"the file is cut short or not JSON ({error})"), False
                if length > MAX_RECORD_BYTES:
                    return _lost(number, f"it is not JSON or over {MAX_RECORD_BYTES} bytes ({error})"), False
            else:
                if end < len(self._text) or self._ended:  # else a number might go on behind what was read
                    self.at = end
                    return entry.at(start, self._byte_offset() - start), True
            self._read_on()

    def _byte_offset(self) -> int:
        """Where `at` is in the file."""
        part = self._text[self._counted : self.at]
        self._offset += len(part) if part.isascii() else len(part.encode("utf-8", "surrogateescape"))
        self._counted = self.at
        return self._offset

    def _read_on(self) -> None:
        """Read at least as much again as is waiting, so that a long item is not parsed once per chunk."""
        begins = not self._byte_offset() and not self._text
        waiting = self._text[self.at :]
        wanted = max(_CHUNK_BYTES, len(waiting))
        data = self._file.read(wanted)
        self._ended = len(data) < wanted
        self._text = waiting + self._decoder.decode(data, self._ended)
        self.at = self._counted = 0
        if begins and data.startswith(codecs.BOM_UTF8):
            self._offset = len(codecs.BOM_UTF8)  # which the decoder leaves out


def _lost(number: int, why: str) -> Entry:
    return Entry(
        number, None, f"and everything after it cannot be read: {why}; correct the file or make it again"
    )


# ---------------------------------------------------------------- values


class _Values:
    """Python's JSON decoder, except that it tells `NaN` and `Infinity` (which are no JSON) from values."""

    def __init__(self) -> None:
        self._constants: list[str] = []
        self._decoder = json.JSONDecoder(parse_constant=self._constants.append)

    def whole(self, number: int, text: str) -> Entry:
        """The one value that a text consists of."""
        self._constants.clear()
        try:
            value = self._decoder.decode(text)
            _check_nesting(value, text)
            return self._entry(number, value)
        except RecursionError:
            return Entry(number, None, "is nested too deeply: no sample is; correct or remove it")
        except json.JSONDecodeError as error:
            place = f"{error.msg}, character {error.pos + 1}"
            return Entry(number, None, f"is not valid JSON ({place}): correct or remove it")
        except ValueError as error:  # an integer of thousands of digits
            return Entry(number, None, f"is not usable JSON ({error}): correct or remove it")

    def first(self, number: int, text: str, at: int) -> tuple[Entry, int]:
        """The value that begins at `at`, and where it ends. Raises ValueError, RecursionError."""
        self._constants.clear()
        value, end = self._decoder.raw_decode(text, at)
        item = text[at:end]
        _check_nesting(value, item)
        if not item.isascii() and _holds_other_bytes(item):
            return Entry(number, None, "is not UTF-8 text: convert the file to UTF-8"), end
        return self._entry(number, value), end

    def _entry(self, number: int, value: object) -> Entry:
        if self._constants:
            return Entry(
                number, None, f"holds {self._constants[0]}, which is no JSON value: correct or remove it"
            )
        if not isinstance(value, dict):
            return Entry(number, None, f"is a JSON {_kind(value)}, not an object: correct or remove it")
        return Entry(number, value)


def _check_nesting(value: object, text: str) -> None:
    """Raises RecursionError over the limit. `text` is what the value was read from."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return  # so few cannot be nested too deeply: true of nearly all samples
    level = [value]
    for _ in range(MAX_NESTING):
        inner = [
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, dict | list)
        ]
        level = [part for parts in inner for part in parts]
    if any(isinstance(part, dict | list) for part in level):
        raise RecursionError


def _holds_other_bytes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _kind(value: object) -> str:
    kinds = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")

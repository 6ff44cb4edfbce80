"""JSON Lines files and JSON lists, read as streams of records: memory does not grow with the file.

Nothing is trusted: text that is not UTF-8, values that are not JSON (`NaN`), nesting without end and
objects without end are each told with their place, and reading goes on behind them where that is possible.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import IO, Any, NamedTuple

from vggt_cache.samples.sample import is_sample
from vggt_cache.samples.unpacked import HEAD_BYTES, damage_of

MAX_RECORD_BYTES = 16 * 2**20
"""Of one sample. Bounds the memory that a file without line ends, or without closing brackets, can take."""
MAX_NESTING = 100
"""Lists and objects in each other. Python's own limit depends on who calls: the same file would be read or not."""
LINES_EXTENSIONS = (".jsonl", ".ndjson", ".jsonlines")
LINES, LIST, VALUES, OBJECT = "JSON Lines", "a JSON list", "JSON objects of several lines", "one JSON object"
_SURELY_SAMPLE_FIELDS = frozenset({"conversations", "current_image"})
"""A *.json of one object may be anything that has images; with one of these it is a sample."""
_CHUNK_BYTES = 2**20
_SPACE = re.compile(r"[ \t\r\n]*")
_KINDS = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}


class Entry(NamedTuple):
    """One line of a JSON Lines file, or one item of a JSON list: a record, or the reason why there is none."""

    number: int
    record: dict[str, Any] | None
    reason: str = ""
    offset: int = 0
    """Where a record begins in its file, in bytes."""
    length: int = 0
    """Bytes of a record."""


def named_lines(path: str) -> bool:
    """Whether the file's name says JSON Lines, and not a JSON list."""
    return path.lower().removesuffix(".gz").endswith(LINES_EXTENSIONS)


def iter_entries(file: io.BufferedReader, path: str) -> Iterator[Entry]:
    """What an annotation file holds, in the order of the file. Its content decides how it is read."""
    yield from _READERS[form_of(file.peek(HEAD_BYTES), path)](file)
    if damage := damage_of(file):
        yield Entry(0, None, f"is damaged or cut short ({damage}): what follows cannot be read")


def form_of(head: bytes, path: str) -> str:
    """What a file is, by its beginning; by its name where that does not tell."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip().decode("utf-8", "surrogateescape")
    line, _, rest = text.partition("\n")
    if not text.startswith("{"):
        is_list = text.startswith("[") and (not rest.strip() or _whole(line) is None)
        return LIST if is_list else LINES
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        next_lines = map(_whole, rest.split("\n", 2)[:2])
        return LINES if named_lines(path) or any(map(is_sample, next_lines)) else OBJECT
    alone = is_sample(value) and (named_lines(path) or not _SURELY_SAMPLE_FIELDS.isdisjoint(value))
    if not (alone or text[end:].strip()):
        return OBJECT
    return VALUES if "\n" in text[:end] else LINES


def _whole(line: str) -> Any:
    """The value that a line consists of; None where it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def parse_record(data: bytes, number: int) -> Entry:
    """The entry that was found at an entry's place, once more."""
    return _Values().whole(data, number, 0)


def iter_json_lines(file: IO[bytes]) -> Iterator[Entry]:
    """One record a line; `number` is the line's, from 1. Blank lines are passed over."""
    values = _Values()
    number = offset = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        offset += len(line)
        if len(line) > MAX_RECORD_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(_CHUNK_BYTES)
                offset += len(line)
            yield Entry(
                number, None, f"is longer than {MAX_RECORD_BYTES} bytes: no sample is; check the file"
            )
            continue
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line and not line.isspace():
            yield values.whole(line, number, offset - len(line))


def iter_json_list(file: IO[bytes]) -> Iterator[Entry]:
    """The items of a list; `number` counts them from 1. Behind a syntax error nothing can be read: it ends there."""
    window = _Window(file)
    if window.next_character() != "[":
        yield Entry(0, None, "is not a JSON list: expected [ at its beginning")
    else:
        yield from window.until_broken(window.items(), ends=True)


def iter_json_values(file: IO[bytes]) -> Iterator[Entry]:
    """Objects one after the other, each over as many lines as it likes; `number` counts them from 1."""
    window = _Window(file)
    yield from window.until_broken(window.values())


def iter_json_object(file: IO[bytes]) -> Iterator[Entry]:
    """The items of those lists in one object whose first items are samples."""
    window = _Window(file)
    yield from window.until_broken((entry for _, entry in window.members()), ends=True)


def lists_of_samples(file: IO[bytes]) -> list[str]:
    """The names under which one object holds lists of samples. Raises ValueError where it is damaged."""
    return list(dict.fromkeys(name for name, _ in _Window(file).members()))


_READERS = {
    LINES: iter_json_lines,
    LIST: iter_json_list,
    VALUES: iter_json_values,
    OBJECT: iter_json_object,
}


class _Window:
    """The part of a file's text that is being parsed: from `at` to the end of what has been read."""

    def __init__(self, file: IO[bytes]) -> None:
        self.at = 0
        self.offset = 0
        """Where `at` is in the file, in bytes."""
        self.number = 0
        """Of the items so far."""
        self._file, self._values = file, _Values()
        self._text, self._ended = "", False
        # Bytes that are no text become lone surrogates, so that only the items that hold them are lost.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        if self.next_character() == "\ufeff" and not self.offset:
            self.go_to(1)

    def until_broken(self, entries: Iterator[Entry], *, ends: bool = False) -> Iterator[Entry]:
        """The entries, and one more for a syntax error, or where the file does not end as it should."""
        try:
            yield from entries
            if ends and self.next_character():
                self.number += 1
                raise ValueError("the list, or the object around it, has ended before it")
        except ValueError as error:
            reason = f"and everything after it cannot be read: {error}; correct the file or make it again"
            yield Entry(self.number, None, reason)

    def items(self) -> Iterator[Entry]:
        """Those of the list that begins here. Raises ValueError where nothing can be read any more."""
        self.go_to(self.at + 1)
        if self.next_character() == "]":
            self.go_to(self.at + 1)
            return
        more = True
        while more:
            self.number += 1
            yield self.take(self.number)
            more = self._goes_on("]")

    def values(self) -> Iterator[Entry]:
        """The values from here to the end of the file. Raises ValueError."""
        while self.next_character():
            self.number += 1
            yield self.take(self.number)

    def members(self) -> Iterator[tuple[str, Entry]]:
        """The items of those lists in the object that begins here whose first items are samples. Raises ValueError."""
        self.next_character()
        self.go_to(self.at + 1)
        more = self.next_character() != "}"
        while more:
            name, _ = self._parsed(self._values.any)
            if self.next_character() != ":":
                raise ValueError(f"expected : behind {name!a}")
            self.go_to(self.at + 1)
            if self.next_character() == "[":
                items = self.items()
                first = next(items, None)
                wanted = first is not None and is_sample(first.record)
                found = [first] if first is not None and wanted else []
                yield from ((str(name), entry) for entry in chain(found, items) if wanted)
            else:
                self._parsed(self._values.any)
            more = self._goes_on("}")

    def go_to(self, at: int) -> None:
        """Pass over what stands before `at`."""
        passed = self._text[self.at : at]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self.at = at

    def next_character(self) -> str:
        """Go to the next character that is not white space; "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self.at)
            self.go_to(match.end() if match else self.at)
            if self.at < len(self._text) or self._ended:
                return self._text[self.at : self.at + 1]
            self._read_on()

    def take(self, number: int) -> Entry:
        """Parse one item and go behind it. Raises ValueError where nothing can be read any more."""
        self.next_character()
        start = self.offset
        record, reason, _ = self._parsed(self._values.first)
        return Entry(number, record, reason, start, self.offset - start)

    def _goes_on(self, end: str) -> bool:
        """Go behind the comma, or the `end` of a list or object."""
        separator = self.next_character()
        if separator not in {",", end}:
            self.number += 1
            found = f"expected a comma or {end} before it, not {separator!a}"
            raise ValueError(found if separator else "the file ends before its list does")
        self.go_to(self.at + 1)
        return separator == ","

    def _parsed(self, parse: Callable[[str, int], Any]) -> Any:
        """What `parse` makes of the text from here on: something, and last where it ends; goes there."""
        self.next_character()
        while True:
            try:
                found = parse(self._text, self.at)
            except RecursionError as error:
                raise ValueError("it is nested too deeply") from error
            except ValueError as error:
                if self._ended:
                    raise ValueError(f"the file is cut short or not JSON ({error})") from error
                if len(self._text) - self.at > MAX_RECORD_BYTES:
                    raise ValueError(f"it is not JSON or over {MAX_RECORD_BYTES} bytes ({error})") from error
            else:
                # At the very end of what was read a number might go on.
                if found[-1] < len(self._text) or self._ended:
                    self.go_to(found[-1])
                    return found
            self._read_on()

    def _read_on(self) -> None:
        """Read at least as much again as is waiting, so that a long item is not parsed once per chunk."""
        waiting = self._text[self.at :]
        wanted = max(_CHUNK_BYTES, len(waiting))
        data = self._file.read(wanted)
        self._ended = len(data) < wanted
        self._text, self.at = waiting + self._decoder.decode(data, self._ended), 0


class _Values:
    """Python's JSON decoder, except that it tells `NaN` and `Infinity` (which are no JSON) from values."""

    def __init__(self) -> None:
        self._constants: list[str] = []
        self._decoder = json.JSONDecoder(parse_constant=self._constants.append)
        self.any = self._decoder.raw_decode

    def whole(self, data: bytes, number: int, offset: int) -> Entry:
        """The one value that some bytes consist of."""
        self._constants.clear()
        try:
            text = data.decode("utf-8")
            value = self._decoder.decode(text)
            _check_nesting(value, text)
            return Entry(number, *self._record(value), offset, len(data))
        except UnicodeDecodeError as error:
            reason = f"is not UTF-8 text (byte {error.start + 1} of the line): convert the file to UTF-8"
        except RecursionError:
            reason = "is nested too deeply: no sample is; correct or remove it"
        except json.JSONDecodeError as error:
            reason = f"is not valid JSON ({error.msg}, character {error.pos + 1}): correct or remove it"
        except ValueError as error:  # an integer of thousands of digits
            reason = f"is not usable JSON ({error}): correct or remove it"
        return Entry(number, None, reason)

    def first(self, text: str, at: int) -> tuple[dict[str, Any] | None, str, int]:
        """The record at `at`, or why it is none, and where the value ends. Raises ValueError, RecursionError."""
        self._constants.clear()
        value, end = self._decoder.raw_decode(text, at)
        item = text[at:end]
        _check_nesting(value, item)
        try:
            if not item.isascii():
                item.encode("utf-8")
        except UnicodeEncodeError:
            return None, "is not UTF-8 text: convert the file to UTF-8", end
        return *self._record(value), end

    def _record(self, value: object) -> tuple[dict[str, Any] | None, str]:
        if self._constants:
            return None, f"holds {self._constants[0]}, which is no JSON value: correct or remove it"
        if not isinstance(value, dict):
            kind = _KINDS.get(type(value), "null")
            return None, f"is a JSON {kind}, not an object: correct or remove it"
        return value, ""


def _check_nesting(value: object, text: str) -> None:
    """Raises RecursionError over the limit. `text` is what the value was read from."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return  # so few cannot be nested too deeply: true of nearly all samples
    level: list[Any] = [[value]]
    for _ in range(MAX_NESTING + 1):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    if level:
        raise RecursionError

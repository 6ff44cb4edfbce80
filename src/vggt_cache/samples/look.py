"""A look into a file that may hold annotations: is it read, and if not, why not?"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from itertools import chain, islice

from vggt_cache.samples.annotations import (
    LINES,
    LINES_EXTENSIONS,
    LIST,
    OBJECT,
    Entry,
    form_of,
    iter_entries,
    lists_of_samples,
    named_lines,
)
from vggt_cache.samples.sample import SAMPLE_FIELDS, fields_text, is_sample
from vggt_cache.samples.unpacked import HEAD_BYTES, open_annotations

_PLAIN_EXTENSIONS = (".json", *LINES_EXTENSIONS)
READ_EXTENSIONS = tuple(name + packed for name in _PLAIN_EXTENSIONS for packed in ("", ".gz"))
_UNPACK, _EXPORT = (
    "is packed in a way that is not read: unpack it, or pack it with gzip",
    "is not read: save it as *.jsonl",
)
MENTIONED_EXTENSIONS = {
    **{name + end: _UNPACK for name in _PLAIN_EXTENSIONS for end in (".zst", ".bz2", ".xz", ".lz4", ".zip")},
    **dict.fromkeys(
        (".parquet", ".arrow", ".csv", ".tsv", ".yaml", ".yml", ".pkl", ".pickle", ".json5"), _EXPORT
    ),
}
"""Files that may be annotations and are not read, and what is said of them."""

_PEEK_BYTES = HEAD_BYTES
_MOST_BYTES, _MOST_RECORDS = 64 * 2**20, 100_000
"""A file without samples up to there is none of ours: about a second."""


def look_into(path: str) -> tuple[str, str]:
    """Why a file is left out, or "" and, where it is not what its name says, what it is. Raises OSError.

    A file that is only damaged is not left out: its reader will say what is lost.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return "is a pipe or device, not a file", ""
    with open_annotations(path) as file:
        head = file.peek(HEAD_BYTES)[:_PEEK_BYTES]
        form = form_of(head, path)
        reason = _why_left_out(file, head, form, path)
    unlike_name = form == OBJECT or (form == LIST) == named_lines(path)
    return reason, f"is {form}, whatever its name says: read as such" if unlike_name and not reason else ""


def begins_a_list(path: str) -> bool:
    """Whether a *.json beside an image is a list, and so no description of the image."""
    try:
        with open_annotations(path) as file:
            return form_of(file.peek(HEAD_BYTES), path) == LIST
    except OSError:
        return False


def _why_left_out(file: io.BufferedReader, head: bytes, form: str, path: str) -> str:
    beginning: io.BufferedReader = io.BufferedReader(io.BytesIO(head), HEAD_BYTES)  # type: ignore[arg-type]
    if form == OBJECT:
        return _why_no_object(file, head, path)
    records, seen = 0, dict[str, None]()
    for entry in chain(iter_entries(beginning, path), _further(file, head, path)):
        if is_sample(entry.record):
            return ""
        if entry.record is not None:
            records += 1
            seen.update(dict.fromkeys(islice(entry.record, 9)))
    named = any(f'"{name}"'.encode() in head for name in SAMPLE_FIELDS)
    if records:
        return (
            f"none of its records up to number {records} has {' or '.join(sorted(SAMPLE_FIELDS))}; they have "
            f"{fields_text(seen) or 'no field'}"
        )
    if not head.strip() and len(head) < HEAD_BYTES:
        return "is empty"
    if (form == LINES and named_lines(path)) or (form == LIST and named):
        return ""
    return "is a list without samples" if form == LIST else "is not JSON"


def _further(file: io.BufferedReader, head: bytes, path: str) -> Iterator[Entry]:
    """What stands in a file whose head shows no sample, up to a limit."""
    if len(file.peek(HEAD_BYTES)) > len(head) or len(head) == HEAD_BYTES:
        for entry in islice(iter_entries(file, path), _MOST_RECORDS):
            yield entry
            if entry.offset > _MOST_BYTES:
                return


def _why_no_object(file: io.BufferedReader, head: bytes, path: str) -> str:
    """One object is read where it holds one list of samples; which of several is meant cannot be known."""
    names = []
    if any(f'"{name}"'.encode() in head for name in SAMPLE_FIELDS):
        try:
            names = lists_of_samples(file)
        except ValueError as error:
            return f"is one JSON object that cannot be read whole ({error})"
    if len(names) == 1:
        return ""
    if names:
        return f"is one JSON object with several lists of samples ({fields_text(names)}): save those that are meant"
    return "is one JSON object, not a list of samples or JSON Lines"

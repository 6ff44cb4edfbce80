"""Annotation files are read as streams; what is wrong with them is reported with its place, and the rest is read."""

from __future__ import annotations

import io
import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.samples import annotations
from vggt_cache.samples.annotations import iter_json_lines, iter_json_list

GOOD = {"images": ["a.png"], "text": "é雪"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(max_size=8), json_values, max_size=4), max_size=8)


class Trickle(io.BytesIO):
    """A file that remembers how much was asked for at once."""

    largest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.largest = max(self.largest, len(data))
        return data


def _lines(data: bytes) -> list[tuple[int, object]]:
    return [
        (e.number, e.record if e.record is not None else e.reason) for e in iter_json_lines(io.BytesIO(data))
    ]


def _items(data: bytes) -> list[tuple[int, object]]:
    return [
        (e.number, e.record if e.record is not None else e.reason) for e in iter_json_list(io.BytesIO(data))
    ]


def _dumped(value: object, **options: object) -> bytes:
    return json.dumps(value, **options).encode("utf-8", "surrogatepass")


# ---------------------------------------------------------------- what is written is what is read


@given(records, st.booleans(), st.sampled_from([b"\n", b"\r\n", b"\n\n  \n"]), st.booleans())
def test_lines_are_read_as_they_were_written(written, bom, end, last_end):
    data = end.join(_dumped(record) for record in written) + (end if last_end else b"")
    read = _lines(b"\xef\xbb\xbf" * bom + data)
    assert [record for _, record in read] == written
    assert [number for number, _ in read] == [1 + end.count(b"\n") * at for at in range(len(written))]


@given(records, st.sampled_from([None, 1]), st.booleans(), st.integers(1, 40))
def test_lists_are_read_as_they_were_written_in_portions_of_any_size(written, indent, bom, portion):
    text = json.dumps(written, indent=indent, ensure_ascii=False)
    data = b"\xef\xbb\xbf" * bom + text.encode("utf-8", "replace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "_CHUNK_BYTES", portion)
        read = _items(data)
    assert read == list(enumerate(json.loads(text.encode("utf-8", "replace")), start=1))


def test_long_lists_are_read_in_bounded_portions_and_memory(monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", 10_000)
    file = Trickle(_dumped([GOOD] * 50_000))
    tracemalloc.start()
    assert sum(entry.record == GOOD for entry in iter_json_list(file)) == 50_000
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert file.largest <= 20_000
    assert peak_bytes < 300_000


def test_one_item_over_many_portions_is_not_parsed_once_per_portion(monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", 1000)
    parsed: list[int] = []
    first = annotations._Values.first
    monkeypatch.setattr(
        annotations._Values, "first", lambda *arguments: (parsed.append(1), first(*arguments))[1]
    )
    assert len(_items(_dumped([{"text": "x" * 1_000_000}]))) == 1
    assert len(parsed) < 15


# ---------------------------------------------------------------- what is wrong is reported, the rest is read


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"images": ["a.png"', "is not valid JSON (Expecting ',' delimiter, character 21)"),
        (b'{"images": []} {"images": []}', "is not valid JSON (Extra data, character 16)"),
        (b'{"score": NaN}', "holds NaN, which is no JSON value"),
        (b'{"score": -Infinity}', "holds -Infinity, which is no JSON value"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b"17", "is a JSON number, not an object"),
        (b"null", "is a JSON null, not an object"),
        (b'{"images": "\xff.png"}', "is not UTF-8 text (byte 13 of the line)"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not usable JSON"),
    ],
)
def test_a_bad_line_costs_that_line(bad, reason):
    good = _dumped(GOOD)
    read = _lines(good + b"\n" + bad + b"\n" + good + b"\n")
    assert [number for number, _ in read] == [1, 2, 3]
    assert read[0][1] == read[2][1] == GOOD
    assert str(read[1][1]).startswith(reason)


def test_a_line_without_end_is_passed_over_in_portions(monkeypatch):
    monkeypatch.setattr(annotations, "MAX_RECORD_BYTES", 1000)
    good = _dumped(GOOD)
    for long in (b"x" * 1001, b"x" * 50_000):
        read = _lines(good + b"\n" + long + b"\n" + good)
        assert [number for number, _ in read] == [1, 2, 3]
        assert str(read[1][1]).startswith("is longer than 1000 bytes")
        assert read[2][1] == GOOD
    exact = _dumped({"text": ""})
    assert _lines(exact.replace(b'""', b'"' + b"x" * (1000 - len(exact)) + b'"'))[0][0] == 1


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"score": NaN}', "holds NaN, which is no JSON value"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b'"text"', "is a JSON string, not an object"),
        (b"17", "is a JSON number, not an object"),
        (b'{"images": "\xff.png"}', "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("portion", [*range(1, 9), 2**20])
def test_a_bad_item_that_ends_costs_that_item(monkeypatch, bad, reason, portion):
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", portion)
    good = json.dumps(GOOD, ensure_ascii=False).encode()
    read = _items(b"[" + good + b"," + bad + b", " + good + b"]")
    assert [number for number, _ in read] == [1, 2, 3]
    assert read[0][1] == read[2][1] == GOOD
    assert str(read[1][1]).startswith(reason)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (
            b'{"images": ["a.png"}, {}]',
            "and everything after it cannot be read: the file is cut short or not JSON",
        ),
        (b'{"images": ["a.p', "and everything after it cannot be read: the file is cut short or not JSON"),
        (b"[" * 100_000, "and everything after it cannot be read: it is nested too deeply"),
        (b"", "and everything after it cannot be read: the file is cut short or not JSON"),
        (b"]", "and everything after it cannot be read"),
    ],
)
def test_where_a_list_breaks_what_came_before_stands_and_the_rest_is_one_problem(rest, reason):
    read = _items(b"[" + _dumped(GOOD) + b", " + rest)
    assert [number for number, _ in read] == [1, 2]
    assert read[0][1] == GOOD
    assert str(read[1][1]).startswith(reason)


@pytest.mark.parametrize(
    ("end", "reason"),
    [(b"", "the file ends before its list does"), (b'{"a": 1}]', "expected a comma or ] before it, not '{'")],
)
def test_a_list_without_comma_or_end_is_one_problem(end, reason):
    read = _items(b"[" + _dumped(GOOD) + end)
    assert read[0] == (1, GOOD)
    assert len(read) == 2
    assert reason in str(read[1][1])


@given(records.filter(len), st.floats(0, 1, exclude_max=True))
def test_a_list_cut_anywhere_gives_a_beginning_of_itself_and_one_problem(written, share):
    data = _dumped(written)
    read = _items(data[: int(len(data) * share)])
    assert [record for _, record in read[:-1]] == written[: len(read) - 1]
    assert isinstance(read[-1][1], str)


def test_a_list_that_never_parses_is_given_up_within_the_limit(monkeypatch):
    monkeypatch.setattr(annotations, "_CHUNK_BYTES", 100)
    monkeypatch.setattr(annotations, "MAX_RECORD_BYTES", 1000)
    file = Trickle(b'[{"a": x' + b" " * 1_000_000)
    (entry,) = iter_json_list(file)
    assert "it is not JSON or over 1000 bytes" in entry.reason
    assert file.tell() < 10_000


@pytest.mark.parametrize("data", [b"", b"{}", b"17", b"\x00\x01", b"{" * 100])
def test_a_file_that_is_no_list_is_one_problem(data):
    assert _items(data) == [(0, "is not a JSON list: expected [ at its beginning")]


punctuation = st.text(alphabet='[]{},:"\\ue1d8 0-+.NaInfity\n', max_size=40).map(str.encode)


@given(st.binary(max_size=200) | punctuation)
def test_no_bytes_crash_the_readers(data):
    for entry in (*iter_json_lines(io.BytesIO(data)), *iter_json_list(io.BytesIO(data))):
        assert (entry.record is None) == bool(entry.reason)

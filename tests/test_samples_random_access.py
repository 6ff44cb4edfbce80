"""Samples by number are the samples that one pass gives, in the same order, wherever the index is used."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tempfile
from array import array
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.errors import DataError
from vggt_cache.samples import (
    Problem,
    Sample,
    SampleIndex,
    Sources,
    annotations,
    find_sources,
    iter_samples,
    sources_of_files,
)
from vggt_cache.samples.sample import text_length

GOOD = {"images": ["a.png"], "conversations": [{"from": "human", "value": "é 雪 go"}]}


def in_one_pass(sources: Sources) -> tuple[list[Sample], list[Problem]]:
    problems: list[Problem] = []
    return list(iter_samples(sources, on_problem=problems.append)), problems


def by_number(sources: Sources) -> tuple[list[Sample], list[Problem]]:
    problems: list[Problem] = []
    index = SampleIndex(sources, on_problem=problems.append)
    return [index[at] for at in range(len(index))], problems


def build(root: Path) -> SampleIndex:
    return SampleIndex(find_sources(root), on_problem=lambda _: None)


def write_lines(path: Path, records: list[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_steps(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / "milestones_result.json").write_text("{}")
    for name in names:
        (folder / name).touch()
    return folder


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """All layouts, with something unusable in each."""
    write_lines(
        tmp_path / "a.jsonl", [GOOD, 5, {"images": ["b.png", "c.png"], "data_path": "deeper"}, {"image": 5}]
    )
    (tmp_path / "deeper").mkdir()
    listed = [{"images": ["é.png"]}, GOOD, [], {"history_images": ["x"]}, {"current_image": "z.png"}]
    (tmp_path / "deeper" / "b.json").write_text(json.dumps(listed, ensure_ascii=False, indent=2))
    write_steps(tmp_path / "ep" / "1", [f"step_{n:04d}_TURN_LEFT.png" for n in (3, 0, 7, 12)])
    write_steps(tmp_path / "ep" / "2", [])
    write_steps(tmp_path / "ep" / "3", [*(f"step_{n}_STOP.png" for n in range(12)), "step_x_STOP.png"])
    return tmp_path


# ---------------------------------------------------------------- the same samples and problems


def test_every_layout_gives_the_same_samples_and_problems_as_one_pass(mixed: Path) -> None:
    sources = find_sources(mixed)
    samples, problems = in_one_pass(sources)
    assert by_number(sources) == (samples, problems)
    assert {sample.layout for sample in samples} == {"conversation", "structured", "episode"}
    assert len(samples) == 2 + 3 + 4 + 12
    assert len(problems) == 2 + 2 + 1 + 1


names = st.lists(st.text("aé雪/", min_size=1, max_size=4), max_size=3)
good = st.fixed_dictionaries(
    {"images": names}, optional={"data_path": st.sampled_from(["", "é", "p/q"]), "note": st.text(max_size=5)}
)
lines = st.lists(
    good.map(lambda record: json.dumps(record).encode())
    | good.map(lambda record: json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.binary(max_size=6).map(lambda data: data.replace(b"\n", b" "))
    | st.just(b"x" * 400),
    max_size=8,
)


@given(lines, st.booleans(), st.booleans())
def test_lines_are_found_again_whatever_stands_between_them(
    written: list[bytes], bom: bool, ended: bool
) -> None:
    data = b"\xef\xbb\xbf" * bom + b"\n".join(written) + b"\n" * ended
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "MAX_RECORD_BYTES", 300)
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        sources = Sources(root=folder, files=(str(path),))
        assert by_number(sources) == in_one_pass(sources)


@given(
    st.lists(good | st.integers(), max_size=8),
    st.sampled_from([None, 1]),
    st.booleans(),
    st.booleans(),
    st.integers(3, 60),
    st.sampled_from(["]", "", ", {", " 5]", ', {"images": ["\udcff"]}, {}]']),
)
def test_items_are_found_again_in_lists_of_any_form(
    written: list[object], indent: int | None, bom: bool, plain: bool, portion: int, end: str
) -> None:
    text = json.dumps(written, indent=indent, ensure_ascii=plain)[:-1] + end
    data = b"\xef\xbb\xbf" * bom + text.encode("utf-8", "surrogateescape")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "_CHUNK_BYTES", portion)
        path = Path(folder) / "a.json"
        path.write_bytes(data)
        sources = Sources(root=folder, files=(str(path),))
        assert by_number(sources) == in_one_pass(sources)


# ---------------------------------------------------------------- numbers


def test_numbers_count_as_in_a_list(mixed: Path) -> None:
    index = build(mixed)
    samples = list(index)
    assert index[-1] == samples[-1]
    with pytest.raises(IndexError):
        index[len(index)]


def test_the_first_of_an_index_are_its_first(mixed: Path) -> None:
    index = build(mixed)
    for count in (0, 1, 7, len(index), 10_000):
        assert list(index.first(count)) == list(index)[:count]
        assert len(index.first(count).lengths) == len(index.first(count))


def test_lengths_are_words_and_252_for_each_frame(tmp_path: Path) -> None:
    talk = [
        {"from": "human", "value": "go to <image> now"},
        {"from": "gpt", "value": "STOP"},
        5,
        {"value": None},
    ]
    structured = {"image": "a.png", "id": "1 2 3", "instruction": "one two", "action": 1}
    write_lines(
        tmp_path / "a.jsonl",
        [{"conversations": talk, "images": ["a", "b"]}, structured, {"conversations": 1}],
    )
    write_steps(tmp_path / "ep", ["step_0_STOP.png"])
    index = build(tmp_path)
    assert index.lengths == array("i", [5 + 2 * 252, 2 + 252, 0, 9 * 252])
    assert index.frame_counts == array("i", [2, 1, 0, 9])


@given(st.dictionaries(st.sampled_from(["conversations", "instruction", "x"]), st.recursive(
    st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["value", "content"]), inner), max_leaves=5)))  # fmt: skip
def test_any_record_has_a_length(record: dict[str, object]) -> None:
    assert text_length(record) >= 0


# ---------------------------------------------------------------- other processes


def _samples_of(index: SampleIndex) -> list[Sample]:
    return [index[at] for at in reversed(range(len(index)))]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_an_index_gives_the_same_samples_in_other_processes(mixed: Path, method: str) -> None:
    index = build(mixed)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_samples_of, [index] * 2) == [_samples_of(index)] * 2


def test_an_index_is_sent_in_about_thirty_bytes_a_sample(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{**GOOD, "pad": "x" * 500}] * 3000)
    index = build(tmp_path)
    assert len(pickle.dumps(index)) < 3000 * 32 + 4000


def test_an_index_keeps_no_file_open(mixed: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    index = build(mixed)
    list(index)
    assert set(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- files that changed


def test_a_file_that_was_written_since_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD])
    index = build(tmp_path)
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(DataError, match=r"a\.jsonl has changed since its samples were counted .*start again"):
        index[0]


def test_the_time_of_change_counts_where_the_size_is_the_same(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD])
    index = build(tmp_path)
    os.utime(path, ns=(0, 5))
    with pytest.raises(DataError, match="has changed"):
        index[1]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("other", [b"{", b" ", b"[]", b"{},"])
def test_other_bytes_under_the_same_state_are_refused(tmp_path: Path, suffix: str, other: bytes) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(json.dumps([GOOD, GOOD]) if suffix == "json" else f"{json.dumps(GOOD)}\n" * 2)
    index = build(tmp_path)
    status = path.stat()
    path.write_bytes((other * status.st_size)[: status.st_size])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match=rf"a\.{suffix} has changed since its samples were counted"):
        index[1]


def test_a_shorter_item_in_an_items_place_is_not_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([GOOD]))
    index = build(tmp_path)
    status = path.stat()
    path.write_text("[" + '{"image": "b.png"},'.ljust(status.st_size - 2) + "]")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(DataError, match="Extra data"):
        index[0]


def test_a_file_that_went_away_is_refused_in_one_sentence(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    index = build(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read any more \(No such file or directory\)"):
        index[0]


# ---------------------------------------------------------------- files named one by one


def test_listed_files_look_in_their_folder_then_beside_the_file(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "notes" / "a.jsonl", [GOOD, {**GOOD, "data_path": "r2r"}])
    second = tmp_path / "notes" / "b.json"
    second.write_text(json.dumps([GOOD]))
    images, others = tmp_path / "images", tmp_path / "others"
    images.mkdir()
    others.mkdir()
    beside = str(tmp_path / "notes")

    one = by_number(sources_of_files(f"{second}, {first}", str(images)))[0]
    assert [sample.bases for sample in one] == [
        (str(images), beside), (str(images / "r2r"), beside), (str(images), beside)
    ]  # fmt: skip
    each = by_number(sources_of_files(f"{first},{second}", f"{images},{others}"))[0]
    assert [sample.bases[0] for sample in each] == [str(images), str(images / "r2r"), str(others)]
    none = by_number(sources_of_files(str(first)))[0]
    assert [sample.bases for sample in none] == [(beside,), (str(tmp_path / "notes" / "r2r"), beside)]


def test_listed_files_may_be_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert by_number(sources_of_files("./a.jsonl", "images"))[0][0].bases == (
        str(tmp_path / "images"),
        str(tmp_path),
    )


@pytest.mark.parametrize(
    ("files", "folders", "sentence"),
    [
        (" , ", "", "--annotation_path names no file"),
        ("gone.jsonl", "", "--annotation_path gone.jsonl does not exist"),
        ("images", "", "--annotation_path images is a folder: give a folder as --data_root"),
        ("a.jsonl,./a.jsonl", "", "a.jsonl twice"),
        ("a.jsonl", "nowhere", "--data_path nowhere is no folder that exists"),
        ("a.jsonl", "images,images", "--data_path names 2 folders for 1 annotation files"),
        ("words.json", "", "words.json holds no samples"),
    ],
)
def test_listed_files_that_cannot_be_used_are_refused_by_their_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: str, folders: str, sentence: str
) -> None:
    write_lines(tmp_path / "a.jsonl", [GOOD])
    (tmp_path / "words.json").write_text('{"a": 1}')
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refusal:
        sources_of_files(files, folders)
    assert sentence in str(refusal.value)

"""What a file holds decides how it is read; what is not read is told. Both readers see the same."""

from __future__ import annotations

import gzip
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.errors import DataError
from vggt_cache.samples import Problem, Sample, SampleIndex, Sources, find_sources, iter_samples, unpacked
from vggt_cache.samples.sample import frame_names

A = {"images": ["a.png"], "conversations": [{"from": "human", "value": "去 é <image>"}]}
B = {"images": ["b.png"], "conversations": []}
NO_SAMPLE = {"instruction": "x", "count": 5}


def lines(*records: object) -> bytes:
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)


def listed(*records: object, indent: int | None = None) -> bytes:
    return json.dumps(list(records), indent=indent, ensure_ascii=False).encode()


def read(sources: Sources) -> tuple[list[Sample], list[Problem]]:
    """By both readers, which must agree."""
    problems: list[Problem] = []
    samples = list(iter_samples(sources, on_problem=problems.append))
    told: list[Problem] = []
    index = SampleIndex(sources, on_problem=told.append)
    assert (list(index), told) == (samples, problems)
    return samples, problems


def names_in(root: Path) -> list[str]:
    samples, problems = read(find_sources(root))
    assert not problems
    return [name for sample in samples for name in sample.frames]


# ---------------------------------------------------------------- read, whatever the name


TEXT = lines(A, B).decode()
READ = {
    "lines in json": ("x.json", lines(A, B)),
    "list in jsonl": ("x.jsonl", listed(A, B, indent=2)),
    "list in one line in jsonl": ("x.jsonl", listed(A, B) + b"\n"),
    "objects over several lines": ("x.jsonl", json.dumps(A, indent=1).encode() + json.dumps(B, indent=1).encode()),
    "one sample over several lines": ("x.json", json.dumps({**A, "images": ["a.png", "b.png"]}, indent=1).encode()),
    "a list in an object": ("x.json", json.dumps({"v": [1], "data": [A, B], "n": {"a": []}}).encode()),
    "a list in an object over lines": ("x.jsonl", json.dumps({"train": [A, B]}, indent=2).encode()),
    "other spelling": ("x.ndjson", lines(A, B)),
    "third spelling": ("x.JsonLines", lines(A, B)),
    "packed lines": ("x.jsonl.gz", gzip.compress(lines(A, B))),
    "packed twice in a row": ("x.jsonl.gz", gzip.compress(lines(A)) + gzip.compress(lines(B))),
    "packed list": ("x.json.gz", gzip.compress(listed(A, B))),
    "packed without a word": ("x.json", gzip.compress(listed(A, B))),
    "packed by name alone": ("x.jsonl.gz", lines(A, B)),
    "packed UTF-16": ("x.jsonl.gz", gzip.compress(TEXT.encode("utf-16"))),
    "UTF-16": ("x.jsonl", TEXT.encode("utf-16")),
    "UTF-16, the other order": ("x.jsonl", b"\xfe\xff" + TEXT.encode("utf-16-be")),
    "UTF-16 without a mark": ("x.jsonl", TEXT.encode("utf-16-le")),
    "UTF-16 list": ("x.json", listed(A, B).decode().encode("utf-16")),
    "UTF-32": ("x.jsonl", TEXT.encode("utf-32")),
    "UTF-8 with a mark": ("x.jsonl", b"\xef\xbb\xbf" + lines(A, B)),
    "first item over the look": ("x.json", listed({"text": "x" * 300_000, **A}, B)),
    "first line over the look": ("x.jsonl", lines({"text": "x" * 300_000, **A}, B)),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_what_can_be_read_without_guessing_is_read(tmp_path, case):
    name, data = READ[case]
    (tmp_path / name).write_bytes(data)
    assert names_in(tmp_path) == ["a.png", "b.png"]


@pytest.mark.parametrize("case", ["list in jsonl", "lines in json", "a list in an object"])
def test_a_file_that_is_not_what_its_name_says_is_told_in_one_sentence(tmp_path, case):
    name, data = READ[case]
    (tmp_path / name).write_bytes(data)
    (line,) = find_sources(tmp_path).remarks()
    assert line.startswith(f"{tmp_path / name} is ")
    assert line.endswith("whatever its name says: read as such")


@pytest.mark.parametrize("case", ["packed lines", "UTF-16", "packed list", "UTF-8 with a mark"])
def test_what_is_as_its_name_says_is_not_told(tmp_path, case):
    name, data = READ[case]
    (tmp_path / name).write_bytes(data)
    assert not list(find_sources(tmp_path).remarks())


@pytest.mark.parametrize("count", [8, 9, 5000])
def test_samples_may_begin_late(tmp_path, count):
    other = [{**NO_SAMPLE, "pad": "x" * 100}] * count
    (tmp_path / "a.jsonl").write_bytes(lines(*other, A))
    (tmp_path / "b.json").write_bytes(listed(*other, B))
    assert names_in(tmp_path) == ["a.png", "b.png"]


@given(
    st.lists(st.fixed_dictionaries({"images": st.lists(st.text("aé雪/😀", min_size=1, max_size=4))}), max_size=8),
    st.sampled_from(["utf-16", "utf-32", "utf-8"]),
    st.booleans(), st.sampled_from([None, 1]), st.booleans(), st.integers(3, 60),
)  # fmt: skip
def test_any_text_in_any_form_is_found_again(
    tmp_path_factory, records, encoding, packed, indent, as_list, piece
):
    text = json.dumps(records, indent=indent, ensure_ascii=False) if as_list else lines(*records).decode()
    data = text.encode(encoding)
    path = tmp_path_factory.mktemp("forms") / "x.json"
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpacked, "_PIECE_BYTES", piece)
        samples, problems = read(Sources(root=str(path.parent), files=(str(path),)))
    if as_list or len(records) > 1:
        assert [list(sample.frames) for sample in samples] == [record["images"] for record in records]
        assert not problems


# ---------------------------------------------------------------- not read, and told


LEFT_OUT = {
    "several lists": ("x.json", json.dumps({"train": [A], "val": [B]}).encode(),
        "is one JSON object with several lists of samples (train, val): save those that are meant"),
    "an object": ("x.json", b'{"episodes": [{"episode_id": 1}]}',
        "is one JSON object, not a list of samples or JSON Lines"),
    "an object that breaks": ("x.json", b'{"data": [{"images": ["a.png"]}], "v": }',
        "is one JSON object that cannot be read whole (the file is cut short or not JSON"),
    "one that may be anything": ("meta.json", b'{"images": ["a.png"]}', "is one JSON object"),
    "other records": ("x.jsonl", lines(NO_SAMPLE, {"video": 1}),
        "none of its records up to number 2 has conversations or current_image or history_images or image or images; "
        "they have instruction, count, video"),
    "other records in a list": ("x.json", listed(NO_SAMPLE), "none of its records up to number 1 has "),
    "numbers": ("x.json", b"[1, 2]", "is a list without samples"),
    "no JSON": ("x.json", b"hello", "is not JSON"),
    "nothing": ("x.json", b" \n", "is empty"),
    "another packing": ("x.jsonl.zst", b"(\xb5/\xfd", "is packed in a way that is not read: unpack it"),
    "a table": ("x.parquet", b"PAR1", "is not read: save it as *.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_file_that_looks_like_annotations_and_is_not_read_is_told(tmp_path, case):
    name, data, reason = LEFT_OUT[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as refusal:
        find_sources(tmp_path)
    assert f"; left out: {tmp_path / name} ({reason}" in str(refusal.value)
    (tmp_path / "good.jsonl").write_bytes(lines(A))
    assert names_in(tmp_path) == ["a.png"]
    (line,) = find_sources(tmp_path).remarks()
    assert line.startswith(f"left out: {tmp_path / name} ({reason}")


def test_a_named_file_that_is_not_read_says_why(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"episodes": []}')
    with pytest.raises(DataError, match=r"left out: .*x\.json \(is one JSON object"):
        find_sources(tmp_path / "x.json")


def test_a_root_with_one_file_of_each_kind_loses_no_sample_and_mentions_every_file(tmp_path):
    for number, (name, data) in enumerate(READ.values()):
        (tmp_path / f"good{number:02d}").mkdir()
        (tmp_path / f"good{number:02d}" / name).write_bytes(data)
    for number, (name, data, _) in enumerate(LEFT_OUT.values()):
        (tmp_path / f"bad{number:02d}").mkdir()
        (tmp_path / f"bad{number:02d}" / name).write_bytes(data)
    episode = tmp_path / "episode"
    (episode / "inner").mkdir(parents=True)
    for name in ("milestones_result.json", "step_0000_STOP.png", "step_0000_STOP.json"):
        (episode / name).write_bytes(b"{}")
    (episode / "again.jsonl").write_bytes(lines(A))
    (episode / "inner" / "more.jsonl").write_bytes(lines(B))
    found = sorted(set(names_in(tmp_path))), len(names_in(tmp_path))
    assert found == (["a.png", "b.png", "step_0000_STOP.png"], 2 * len(READ) + 9)
    sources = find_sources(tmp_path)
    told = {problem.path for problem in sources.left_out} | {*sources.files}
    files = {str(path) for path in tmp_path.rglob("*") if path.is_file() and path.parent != episode}
    assert told == files - {str(episode / "inner" / "more.jsonl")} | {str(episode / "again.jsonl")}
    left_out = [line for line in sources.remarks() if line.startswith("left out: ")]
    assert len(left_out) == len(LEFT_OUT) + 1
    reason = "is in an episode folder, of which only the steps are read, and 1 more there"
    assert f"left out: {episode / 'again.jsonl'} ({reason})" in left_out


def test_many_files_that_are_left_out_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(A))
    for number in range(130):
        (tmp_path / f"{number:03d}.json").write_bytes(b"{}")
    told = list(find_sources(tmp_path).remarks())
    assert len(told) == 101
    assert told[-1] == "left out: 30 more files that look like annotations"


# ---------------------------------------------------------------- damage


def test_a_packed_file_that_is_cut_short_gives_what_comes_before_and_is_told(tmp_path):
    whole = gzip.compress(lines(*[{"images": [f"{n}.png"], "pad": str(hash(str(n)))} for n in range(5000)]))
    (tmp_path / "x.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    samples, problems = read(find_sources(tmp_path))
    assert [sample.frames for sample in samples] == [(f"{n}.png",) for n in range(len(samples))]
    assert 1000 < len(samples) < 5000
    assert "is damaged or cut short (Compressed file ended" in problems[-1].reason


def test_what_is_no_text_costs_the_records_that_hold_it(tmp_path):
    bad = b"\x00\xd8x\x00"  # half of a pair
    data = [json.dumps(record).encode("utf-16-le") for record in (A, {"images": ["HERE"]}, B)]
    data[1] = data[1].replace("HERE".encode("utf-16-le"), bad)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe" + "\n".encode("utf-16-le").join(data))
    samples, problems = read(find_sources(tmp_path))
    assert [sample.frames for sample in samples] == [("a.png",), ("b.png",)]
    assert [problem.line for problem in problems] == [2]


def test_what_stands_behind_a_list_is_told(tmp_path):
    (tmp_path / "x.json").write_bytes(listed(A) + b"," + listed(B))
    samples, problems = read(find_sources(tmp_path))
    assert len(samples) == 1
    assert "has ended before it" in problems[0].reason


def test_a_text_that_would_take_too_much_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(unpacked, "MAX_HELD_BYTES", 1000)
    (tmp_path / "x.jsonl.gz").write_bytes(
        gzip.compress(lines(*[{**A, "n": hash(str(n))} for n in range(900)]))
    )
    problems: list[Problem] = []
    SampleIndex(find_sources(tmp_path), on_problem=problems.append)
    assert "over 1000 bytes packed: unpack it" in problems[-1].reason


def _first(index: SampleIndex) -> Sample:
    return index[0]


def test_an_index_of_packed_files_works_in_other_processes(tmp_path):
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(lines(A)))
    index = SampleIndex(find_sources(tmp_path), on_problem=lambda _: None)
    (tmp_path / "x.jsonl.gz").unlink()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_first, [index])[0].frames == ("a.png",)


# ---------------------------------------------------------------- records


def test_a_name_in_an_object_is_a_name():
    assert frame_names({"images": [{"path": "a.png", "bytes": None}, "b.png"]}) == ("a.png", "b.png")
    assert frame_names({"image": {"path": "a.png"}}) == ("a.png",)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image_path": "x.png", "conversations": [{"value": "<image> go"}]}, "has <image> but names no frame"),
        ({"video": "x.mp4", "conversations": [{"content": "<video> go"}]}, "has <video> but names no frame"),
        ({"instruction": "go", "video": "x.mp4", "images": []}, "has video but names no frame (its fields: instr"),
    ],
)  # fmt: skip
def test_a_record_that_speaks_of_frames_and_names_none_is_told(tmp_path, record: dict[str, Any], reason):
    (tmp_path / "x.jsonl").write_bytes(lines(A, record, {"conversations": [{"value": "text alone"}]}))
    samples, problems = read(find_sources(tmp_path))
    assert [sample.frames for sample in samples] == [("a.png",), ()]
    assert [problem.line for problem in problems] == [2]
    assert problems[0].reason.startswith(reason)

"""Every layout becomes the same ordered frame lists; what is not a sample is reported and left out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.samples import Problem, Sample, find_sources, iter_samples
from vggt_cache.samples.sample import UnusableSampleError, frame_names


def _read(root: Path) -> tuple[list[Sample], list[Problem]]:
    problems: list[Problem] = []
    return list(iter_samples(find_sources(root), on_problem=problems.append)), problems


def _write_lines(path: Path, records: list[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---------------------------------------------------------------- frames of a record


@pytest.mark.parametrize(
    ("record", "frames"),
    [
        ({"images": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"images": "a"}, ("a",)),
        ({"image": "a"}, ("a",)),
        ({"image": ["a", "b"]}, ("a", "b")),
        ({"history_images": ["a", "b"], "current_image": "c"}, ("a", "b", "c")),
        ({"history_images": [], "current_image": "c"}, ("c",)),
        ({"current_image": "c"}, ("c",)),
        ({"images": None, "image": [], "history_images": ["a"], "current_image": ["b"]}, ("a", "b")),
        ({"images": ["a"], "image": "b", "current_image": "c"}, ("a",)),
        ({"images": ["a", "a"]}, ("a", "a")),
        ({"images": []}, ()),
        ({"conversations": []}, ()),
    ],
)
def test_each_way_to_name_frames_is_read_in_order(record, frames):
    assert frame_names(record) == frames


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"images": ["a", 5]}, "has int 5 in images: expected a file name"),
        ({"images": {"a": 1}}, "has dict {'a': 1} in images"),
        ({"image": ""}, "has an empty name in image"),
        ({"images": ["a", ""]}, "has an empty name in images"),
        ({"images": [["a"]]}, "has list ['a'] in images"),
        ({"images": ["a\0b"]}, "which cannot be a file name"),
        ({"images": ["\ud800.png"]}, "which cannot be a file name"),
        ({"images": ["x" * 4097]}, "has a name of 4097 characters in images, over the limit of 4096"),
        ({"history_images": ["a"]}, "has history_images but no current_image"),
        ({"current_image": ["a", "b"]}, "names 2 images as current_image"),
    ],
)
def test_names_that_no_file_can_have_are_refused(record, reason):
    with pytest.raises(UnusableSampleError) as refusal:
        frame_names(record)
    assert reason in str(refusal.value)


json_leaves = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
any_json = st.recursive(json_leaves, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
FIELDS = ["images", "image", "history_images", "current_image", "conversations"]


@given(st.dictionaries(st.sampled_from(FIELDS), any_json))
def test_any_record_gives_names_or_a_reason(record):
    with suppress(UnusableSampleError):
        assert all(isinstance(name, str) and name for name in frame_names(record))


# ---------------------------------------------------------------- whole data roots


def test_samples_say_where_they_stand_and_where_their_names_are_looked_for(tmp_path):
    with_path = {"images": ["1.png"], "data_path": "r2r/frames", "conversations": []}
    _write_lines(tmp_path / "ann" / "a.jsonl", [{"image": "0.png"}, with_path, with_path])
    _write_lines(tmp_path / "top.jsonl", [{"image": "2.png"}])
    (tmp_path / "ann" / "b.json").write_text(json.dumps([{"images": ["3.png"], "data_path": "/abs"}]))
    samples, problems = _read(tmp_path)
    assert not problems
    root, beside = str(tmp_path), str(tmp_path / "ann")
    assert [(s.frames, s.bases, s.source, s.layout) for s in samples] == [
        (("0.png",), (root, beside), f"{beside}/a.jsonl:1", "structured"),
        (("1.png",), (f"{root}/r2r/frames", beside), f"{beside}/a.jsonl:2", "conversation"),
        (("1.png",), (f"{root}/r2r/frames", beside), f"{beside}/a.jsonl:3", "conversation"),
        (("2.png",), (root,), f"{root}/top.jsonl:1", "structured"),
        (("3.png",), ("/abs", beside), f"{beside}/b.json:1", "structured"),
    ]
    assert samples[1].record == with_path


def test_a_data_path_that_goes_up_leads_where_the_system_says(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far" / "inner")
    records = [{"image": "x", "data_path": path} for path in ("sub/../sub", "link/..", "./sub//")]
    _write_lines(tmp_path / "data" / "a.jsonl", records)
    samples, _ = _read(tmp_path / "data")
    root = str(tmp_path / "data")
    assert [sample.bases[0] for sample in samples] == [f"{root}/sub", f"{root}/link/..", f"{root}/sub"]


def test_bad_samples_are_told_with_their_place_and_the_rest_is_read(tmp_path):
    good = {"image": "a.png"}
    bad = [{"image": 5}, {"image": "a", "data_path": 7}, [1], {"image": "a", "data_path": "x\0y"}]
    _write_lines(tmp_path / "a.jsonl", [good, *bad, good])
    (tmp_path / "b.json").write_text(f"[{json.dumps(good)}, {json.dumps(bad[0])}, {json.dumps(good)}, oops")
    samples, problems = _read(tmp_path)
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.json")
    assert [sample.source for sample in samples] == [f"{first}:1", f"{first}:6", f"{second}:1", f"{second}:3"]
    assert [problem.where for problem in problems] == [
        *(f"{first}:{line}" for line in (2, 3, 4, 5)),
        f"{second}:2",
        f"{second}:4",
    ]
    assert "data_path" in problems[1].reason


def test_samples_without_frames_are_given(tmp_path):
    _write_lines(tmp_path / "a.jsonl", [{"conversations": []}, {"image": "a.png"}])
    samples, problems = _read(tmp_path)
    assert [sample.frames for sample in samples] == [(), ("a.png",)]
    assert not problems


def test_a_file_that_goes_away_is_told_and_the_rest_is_read(tmp_path):
    _write_lines(tmp_path / "a.jsonl", [{"image": "a.png"}])
    _write_lines(tmp_path / "b.jsonl", [{"image": "b.png"}])
    sources = find_sources(tmp_path)
    os.unlink(tmp_path / "a.jsonl")
    problems: list[Problem] = []
    assert [sample.frames for sample in iter_samples(sources, on_problem=problems.append)] == [("b.png",)]
    assert problems[0].where == f"{tmp_path}/a.jsonl:1"
    assert problems[0].reason.startswith("cannot be read (No such file or directory)")


def test_what_the_walk_could_not_read_is_told_too(tmp_path):
    _write_lines(tmp_path / "a.jsonl", [{"image": "a.png"}])
    (tmp_path / "gone.json").symlink_to("nowhere.json")
    _, problems = _read(tmp_path)
    assert [problem.where for problem in problems] == [str(tmp_path / "gone.json")]


def test_reading_is_lazy(tmp_path):
    _write_lines(tmp_path / "a.jsonl", [{"image": "a.png"}, {"image": 5}])
    problems: list[Problem] = []
    samples = iter_samples(find_sources(tmp_path), on_problem=problems.append)
    assert next(samples).frames == ("a.png",)
    assert not problems
    assert list(samples) == []
    assert len(problems) == 1


def test_the_reader_needs_neither_torch_nor_pillow():
    code = "import sys, vggt_cache.samples; sys.exit(bool({'torch', 'PIL', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

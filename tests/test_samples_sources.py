"""One walk finds all annotation files and episode folders, and nothing else, in the same order every time."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.errors import DataError
from vggt_cache.samples import Problem, find_sources, look, unpacked
from vggt_cache.samples import walk as walk_module

SAMPLE = {"images": ["a.png"], "conversations": []}


def _put(path: Path, content: object = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        content if isinstance(content, str) else json.dumps([SAMPLE] if content is None else content)
    )
    return path


def _relative(root: Path, paths: tuple[str, ...]) -> list[str]:
    return [os.path.relpath(path, root) for path in paths]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All layouts, and much that looks similar."""
    root = tmp_path / "data"
    _put(root / "b" / "train.jsonl", json.dumps(SAMPLE))
    _put(root / "a" / "TRAIN.JSONL", json.dumps(SAMPLE))
    _put(root / "b" / "train.json")
    _put(
        root / "b" / "deep" / "er" / "more.json",
        "\n\ufeff [".replace("\n\ufeff", "") + json.dumps(SAMPLE) + "]",
    )
    _put(root / "meta.json", {"images": ["a.png"]})
    _put(root / "scores.json", [1, 2, 3])
    _put(root / "boxes.json", [{"bbox": [1, 2]}])
    _put(root / "failures.jsonl", '{"path": "x.png", "reason": "gone"}\n')
    _put(root / "notes.txt", "images")
    for step in range(3):
        _put(root / "train" / "17" / f"step_{step:04d}_STOP.json")
    _put(root / "train" / "17" / "milestones_result.json", {"instruction_text": "go"})
    _put(root / "train" / "17" / "inner" / "train.jsonl", json.dumps(SAMPLE))
    _put(root / "train" / "9" / "milestones_result.json", {})
    _put(root / ".hidden" / "train.jsonl", json.dumps(SAMPLE))
    _put(root / "._train.jsonl", json.dumps(SAMPLE))
    return root


def test_all_annotations_and_episodes_are_found_and_nothing_else(tree):
    found = find_sources(tree)
    assert found.root == str(tree)
    assert _relative(tree, found.jsonl_files) == ["a/TRAIN.JSONL", "b/train.jsonl"]
    assert _relative(tree, found.json_files) == ["b/deep/er/more.json", "b/train.json"]
    assert _relative(tree, found.episode_dirs) == ["train/17", "train/9"]
    assert found.problems == ()


def test_the_order_is_not_that_of_the_file_system(tree, monkeypatch):
    expected = find_sources(tree)
    scan = os.scandir

    class Backwards:
        def __init__(self, path: str) -> None:
            with scan(path) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> object:
            return iter(self._entries)

        def __exit__(self, *exc: object) -> None: ...

    monkeypatch.setattr(walk_module.os, "scandir", Backwards)
    assert find_sources(tree) == expected


def test_a_relative_root_means_the_same_as_an_absolute_one(tree, monkeypatch):
    monkeypatch.chdir(tree / "b")
    assert find_sources("..") == find_sources(f"{tree}/") == find_sources(tree)


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_one_annotation_file_can_be_the_root(tree, name):
    found = find_sources(tree / "b" / name)
    assert found.root == str(tree / "b")
    assert _relative(tree, found.jsonl_files + found.json_files) == [f"b/{name}"]


def test_an_episode_folder_can_be_the_root(tree):
    assert _relative(tree, find_sources(tree / "train" / "9").episode_dirs) == ["train/9"]


# ---------------------------------------------------------------- what is an annotation file


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([SAMPLE], True),
        ([{"image": "x.png"}], True),
        ([{"history_images": [], "current_image": "x.png"}], True),
        ([{"conversations": []}], True),
        ([{"bbox": 1}, {"bbox": 2}, SAMPLE], True),
        ([17, SAMPLE], True),
        ('[{"images": ["a.png"], "broken": ', True),
        ('\ufeff \n[{"images": ["a.png"] oops', True),
        ([], False),
        ([{"bbox": 1}], False),
        ("", False),
        ("[", False),
        ('{"images": ["a.png"]}', False),
        ("not json", False),
    ],
)
def test_a_json_file_is_read_if_it_begins_like_a_list_of_samples(tmp_path, content, expected):
    _put(tmp_path / "train.jsonl", json.dumps(SAMPLE))
    _put(tmp_path / "other.json", content)
    assert bool(find_sources(tmp_path).json_files) == expected


@pytest.mark.parametrize("content", ["not json\n", '{"images": ["a.png"'])
def test_a_damaged_json_lines_file_is_left_to_its_reader(tmp_path, content):
    _put(tmp_path / "train.jsonl", content)
    assert len(find_sources(tmp_path).jsonl_files) == 1


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_an_empty_file_is_told(tmp_path, content):
    full, empty = _put(tmp_path / "a.jsonl", json.dumps(SAMPLE)), _put(tmp_path / "b.jsonl", content)
    found = find_sources(tmp_path)
    assert (found.files, list(found.remarks())) == ((str(full),), [f"left out: {empty} (is empty)"])


def test_a_sample_longer_than_the_look_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(look, "_PEEK_BYTES", 100)
    _put(tmp_path / "train.json", [{"images": ["a.png"], "text": "x" * 1000}])
    _put(tmp_path / "train.jsonl", json.dumps({"text": "x" * 1000, "images": ["a.png"]}))
    found = find_sources(tmp_path)
    assert (len(found.json_files), len(found.jsonl_files)) == (1, 1)


def test_only_the_beginning_of_a_file_is_read(tmp_path, monkeypatch):
    """Annotation files have gigabytes."""
    _put(tmp_path / "train.json", [SAMPLE] * 20_000)
    portions: list[int] = []

    class Counted(io.FileIO):
        def readinto(self, buffer: memoryview, /) -> int | None:
            portions.append(super().readinto(buffer) or 0)
            return portions[-1]

    monkeypatch.setattr(
        unpacked, "open", lambda fd, mode, size: io.BufferedReader(Counted(fd, mode), size), raising=False
    )
    assert len(find_sources(tmp_path).json_files) == 1
    assert 0 < sum(portions) <= 256 * 1024


def test_the_description_of_an_image_beside_it_is_no_annotation_but_a_list_is(tmp_path):
    for extension in ("png", "JPG", "jpeg", "webp", "bmp", "gif"):
        (tmp_path / f"frame_{extension}.{extension}").touch()
        _put(tmp_path / f"frame_{extension}.json", SAMPLE)
    (tmp_path / "train.png").touch()
    _put(tmp_path / "train.json")
    found = find_sources(tmp_path)
    assert _relative(tmp_path, found.json_files) == ["train.json"]
    (line,) = found.remarks()
    assert (
        line
        == f"left out: {tmp_path}/frame_JPG.json (describes the image of the same name, and 5 more there)"
    )


def test_of_a_million_descriptions_few_are_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(walk_module, "_MOST_SIDECARS_OPENED", 3)
    opened: list[str] = []
    monkeypatch.setattr(walk_module, "begins_a_list", lambda path: bool(opened.append(path)))
    _put(tmp_path / "train.jsonl", json.dumps(SAMPLE))
    for number in range(9):
        (tmp_path / f"{number}.png").touch()
        _put(tmp_path / f"{number}.json", SAMPLE)
    assert "and 8 more there" in "".join(find_sources(tmp_path).remarks())
    assert len(opened) == 3


# ---------------------------------------------------------------- links


def test_links_that_lead_round_in_circles_end(tree):
    (tree / "b" / "up").symlink_to(tree)
    (tree / "b" / "beside").symlink_to("../a")
    (tree / "out").symlink_to(tree.parent)
    _put(
        tree.parent / "neighbour" / "train.jsonl", json.dumps(SAMPLE)
    )  # not below the root, whatever `out` says
    (tree / "self").symlink_to("self")
    (tree / "self.json").symlink_to("self.json")
    plain = find_sources(tree)
    assert _relative(tree, plain.jsonl_files) == ["a/TRAIN.JSONL", "b/train.jsonl"]
    assert _relative(tree, plain.json_files) == ["b/deep/er/more.json", "b/train.json"]
    assert [problem.where for problem in plain.problems] == [str(tree / "self.json")]


def test_a_file_with_several_names_is_read_once_and_the_others_are_told(tmp_path):
    real = _put(tmp_path / "b.jsonl", json.dumps(SAMPLE))
    (tmp_path / "a.jsonl").symlink_to(real.name)
    os.link(real, tmp_path / "c.json")
    found = find_sources(tmp_path)
    assert found.files == (str(real),)
    assert list(found.remarks()) == [
        f"left out: {tmp_path / name} (is the same file as {real})" for name in ("a.jsonl", "c.json")
    ]


def test_a_folder_that_only_links_lead_to_is_read_once(tree, tmp_path):
    outside = tmp_path / "elsewhere"
    _put(outside / "more" / "x.jsonl", json.dumps(SAMPLE))
    (outside / "more" / "back").symlink_to(tree)
    (tree / "z_link").symlink_to(outside)
    (tree / "y_link").symlink_to(outside)
    assert _relative(tree, find_sources(tree).jsonl_files) == [
        "a/TRAIN.JSONL",
        "b/train.jsonl",
        "y_link/more/x.jsonl",
    ]


def test_a_link_as_root_is_followed_and_kept_as_a_name(tree, tmp_path):
    (tmp_path / "link").symlink_to(tree)
    found = find_sources(tmp_path / "link")
    assert found.root == str(tmp_path / "link")
    assert _relative(tmp_path, found.jsonl_files) == ["link/a/TRAIN.JSONL", "link/b/train.jsonl"]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=6))
def test_any_web_of_links_is_walked_once(tmp_path_factory, links):
    root = tmp_path_factory.mktemp("web")
    for number in range(6):
        _put(root / f"d{number}" / "a.jsonl", json.dumps(SAMPLE))
    for at, (source, target) in enumerate(links):
        (root / f"d{source}" / f"l{at}").symlink_to(root / f"d{target}")
    found = find_sources(root)
    shutil.rmtree(root)
    assert _relative(root, found.jsonl_files) == [f"d{number}/a.jsonl" for number in range(6)]


# ---------------------------------------------------------------- refusals


def test_a_root_that_is_absent_is_refused(tmp_path):
    for root in (tmp_path / "absent", tmp_path / "absent" / "deeper", ""):
        with pytest.raises(DataError, match="does not exist: check --data_root"):
            find_sources(root)


def test_a_root_of_another_kind_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is neither a folder nor a file"):
        find_sources(tmp_path / "pipe.jsonl")


@pytest.mark.timeout(20)
def test_pipes_below_the_root_are_not_opened(tree):
    os.mkfifo(tree / "pipe.jsonl")
    (tree / "link.json").symlink_to("pipe.jsonl")
    assert len(find_sources(tree).jsonl_files) == 2


@pytest.mark.parametrize("name", ["notes.txt", "boxes.json", "failures.jsonl"])
def test_a_root_file_without_samples_is_refused(tree, name):
    with pytest.raises(DataError, match="holds no samples: name a JSON Lines file"):
        find_sources(tree / name)


def test_a_root_without_samples_is_refused_and_says_what_was_looked_for(tmp_path):
    (tmp_path / "frame.png").touch()
    with pytest.raises(DataError) as refusal:
        find_sources(tmp_path)
    sentence = str(refusal.value)
    assert str(tmp_path) in sentence
    assert all(
        part in sentence for part in ("*.jsonl", "*.json", "milestones_result.json", "check --data_root")
    )


def test_a_folder_that_may_not_be_listed_is_told_and_the_rest_is_found(tree, monkeypatch):
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(walk_module.os, "scandir", refuse)  # root, as which tests may run, is refused nothing
    found = find_sources(tree)
    assert _relative(tree, found.jsonl_files) == ["a/TRAIN.JSONL"]
    reason = "cannot be read (Permission denied): check its mode and its mount"
    assert found.problems == (Problem(path=str(tree / "b"), line=0, reason=reason),)


def test_a_root_that_may_not_be_listed_is_refused(tree, monkeypatch):
    def refuse(path: str) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(walk_module.os, "scandir", refuse)
    with pytest.raises(DataError, match=r"^the data root .* cannot be read \(Permission denied\)"):
        find_sources(tree)


def test_an_annotation_file_that_leads_nowhere_is_told(tree):
    (tree / "gone.jsonl").symlink_to("/nowhere/train.jsonl")
    (problem,) = find_sources(tree).problems
    assert problem.where == str(tree / "gone.jsonl")
    assert problem.reason.startswith("cannot be read (No such file or directory)")

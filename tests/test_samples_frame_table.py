"""Every name leads to the file that is meant, every file is one frame, and no file is opened."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.samples import FrameTable, Sample, frame_table, locate_frame, paths
from vggt_cache.samples.frame_table import PathList


def _sample(frames: list[str], *bases: object) -> Sample:
    return Sample(
        frames=tuple(frames),
        bases=tuple(str(base) for base in bases),
        source="a.jsonl:1",
        record={},
        layout="structured",
    )


def _state(path: Path) -> tuple[int, int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(str(path).encode())
    return path


# ---------------------------------------------------------------- one name


def test_a_relative_name_is_looked_for_in_each_base_in_turn(tmp_path):
    in_both, in_second = _file(tmp_path / "one" / "a.png"), _file(tmp_path / "two" / "b.png")
    _file(tmp_path / "two" / "a.png")
    bases = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert locate_frame(bases, "a.png") == (str(in_both), _state(in_both))
    assert locate_frame(bases, "b.png") == (str(in_second), _state(in_second))
    assert locate_frame(bases, "c.png") == (str(tmp_path / "one" / "c.png"), None)


def test_an_absolute_name_is_taken_as_it_is(tmp_path):
    target = _file(tmp_path / "a.png")
    assert locate_frame(["/nowhere", "/else"], str(target)) == (str(target), _state(target))
    assert locate_frame(["/nowhere"], "/absent/a.png") == ("/absent/a.png", None)


def test_a_base_that_is_a_file_is_passed_over(tmp_path):
    _file(tmp_path / "file")
    target = _file(tmp_path / "b.png")
    assert locate_frame([str(tmp_path / "file"), str(tmp_path)], "b.png") == (str(target), _state(target))


def test_a_base_that_cannot_be_looked_into_does_not_change_which_image_is_meant(tmp_path, monkeypatch):
    _file(tmp_path / "two" / "a.png")
    look = os.stat

    def refuse(path: str) -> os.stat_result:
        if "one" in path:
            raise PermissionError(13, "Permission denied")
        return look(path)

    monkeypatch.setattr(paths.os, "stat", refuse)
    bases = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert locate_frame(bases, "a.png") == (str(tmp_path / "one" / "a.png"), None)


@pytest.mark.parametrize("name", ["./a.png", "x/../a.png", "x//..//./a.png", "../x.d/a.png"])
def test_names_are_made_tidy_where_that_changes_nothing(tmp_path, name):
    target = _file(tmp_path / "x.d" / "a.png")
    (tmp_path / "x.d" / "x").mkdir()
    assert locate_frame([str(tmp_path / "x.d")], name)[0] == str(target)


def test_two_dots_after_a_link_lead_where_the_system_says(tmp_path):
    _file(tmp_path / "a.png")
    meant = _file(tmp_path / "far" / "a.png")
    (tmp_path / "far" / "inner").mkdir()
    (tmp_path / "link").symlink_to("far/inner")
    path, state = locate_frame([str(tmp_path)], "link/../a.png")
    assert os.path.samefile(path, meant)
    assert state == _state(meant)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\ud800"])
def test_names_that_the_system_refuses_are_missing_frames(tmp_path, name):
    assert locate_frame([str(tmp_path)], name)[1] is None


# ---------------------------------------------------------------- tables


def test_names_that_lead_to_one_file_are_one_frame(tmp_path):
    target, other = _file(tmp_path / "ep" / "a.png"), _file(tmp_path / "ep" / "b.png")
    table = FrameTable()
    first = table.add(_sample(["ep/a.png", "ep/b.png", "ep/a.png"], tmp_path))
    second = table.add(_sample(["a.png", str(target), "missing.png"], tmp_path / "ep"))
    third = table.add(_sample(["ep/a.png"], tmp_path))
    assert first[0] == first[2] == third[0]
    table.resolve(threads=2)
    frames = [[table.frame_ids()[reference] for reference in ids] for ids in (first, second, third)]
    assert frames == [[0, 1, 0], [0, 0, 2], [0]]
    assert list(table.paths) == [str(target), str(other), str(tmp_path / "ep" / "missing.png")]
    assert [table.state(frame) for frame in range(3)] == [_state(target), _state(other), None]
    assert list(table.frame_ids()) == [table.frame_ids()[reference] for reference in range(5)]


def test_hard_links_and_symbolic_links_stay_frames_of_their_own(tmp_path):
    _file(tmp_path / "a.png")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    table = FrameTable()
    table.add(_sample(["a.png", "b.png", "c.png"], tmp_path))
    table.resolve()
    assert len(table) == 3


bases = st.sampled_from([("/d",), ("/d", "/d/e"), ("/d/e", "/d")])
names = st.sampled_from(["a", "b", "e/a", "/d/a", "/d/e/a", "./a", "é", "\udcff", "e//a"])


@given(
    st.lists(st.tuples(bases, st.lists(names, max_size=4)), max_size=12), st.integers(1, 4), st.integers(1, 3)
)
def test_tables_agree_with_looking_up_each_name(samples, threads, portion):
    table = FrameTable()
    ids = [table.add(_sample(frames, *folders)) for folders, frames in samples]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frame_table, "_NAMES_PER_CALL", portion)
        table.resolve(threads)
    found = [[table.paths[table.frame_ids()[reference]] for reference in references] for references in ids]
    assert found == [[locate_frame(folders, name)[0] for name in frames] for folders, frames in samples]
    assert len(set(table.paths)) == len(table)
    flat = [path for sample in found for path in sample]
    assert list(table.paths) == list(dict.fromkeys(flat))  # in the order of first appearance


@given(
    st.lists(st.tuples(st.sampled_from(["", "/d", "/é"]), st.text(min_size=1).filter(lambda t: t.isascii())))
)
def test_a_list_of_paths_is_a_list(pairs):
    compact = PathList()
    for folder, name in pairs:
        compact.append(folder, name)
    expected = [f"{folder}/{name}" for folder, name in pairs]
    assert list(compact) == expected
    assert compact[1:] == expected[1:]
    if expected:
        assert (compact[-1], compact[0]) == (expected[-1], expected[0])
    with pytest.raises(IndexError):
        compact[len(expected)]


def test_no_image_is_opened(tmp_path, monkeypatch):
    _file(tmp_path / "a.png")
    table = FrameTable()
    table.add(_sample(["a.png", "b.png"], tmp_path))

    def refuse(*arguments: object, **options: object) -> object:
        pytest.fail(f"opened {arguments}")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    table.resolve()
    assert len(table) == 2


def test_each_name_is_looked_at_once(tmp_path, monkeypatch):
    _file(tmp_path / "a.png")
    looked: list[str] = []
    look = os.stat
    monkeypatch.setattr(paths.os, "stat", lambda path: (looked.append(path), look(path))[1])
    table = FrameTable()
    for _ in range(50):
        table.add(_sample(["a.png"] * 9, tmp_path))
    table.resolve()
    assert looked == [str(tmp_path / "a.png")]


def test_states_that_do_not_fit_count_as_unknown(tmp_path, monkeypatch):
    states = [(1, 1 << 63, 0, 0), (1, -5, 2, (1 << 64) - 1)]
    monkeypatch.setattr(frame_table, "locate_frame", lambda bases, name: (f"/{name}", states[int(name)]))
    table = FrameTable()
    table.add(_sample(["0", "1"], tmp_path))
    table.resolve()
    assert [table.state(0), table.state(1)] == [None, states[1]]


def test_a_resolved_table_takes_no_more_samples(tmp_path):
    table = FrameTable()
    table.resolve()
    assert list(table.paths) == []
    with pytest.raises(ValueError, match="make a new one"):
        table.add(_sample(["a"], tmp_path))


def test_memory_for_millions_of_images_is_bounded(tmp_path):
    tracemalloc.start()
    table = FrameTable()
    for step in range(20_000):
        names = [f"episode_{step // 60}/{frame:04d}_move_forward.png" for frame in range(step - 2, step + 1)]
        table.add(_sample(names, tmp_path))
    added_bytes = tracemalloc.get_traced_memory()[0]
    table.resolve(threads=2)
    resolved_bytes, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(table) > 20_000
    assert added_bytes < 200 * len(table)
    assert resolved_bytes < 120 * len(table)
    assert peak_bytes < 290 * len(table)

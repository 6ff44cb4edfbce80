"""An episode folder gives one sample per step, with JanusVLN's sampling of the frames before it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vggt_cache.errors import DataError
from vggt_cache.samples import Problem, Sample, find_sources, history_indexes, iter_samples, read_episode_text

TEXTS = {
    "instruction_text": "Walk to the kitchen.",
    "subinstructions": ["Leave the room.", "Turn left.", "Enter the kitchen."],
    "completion_checkpoints": [{"checkpoint_frame_index": at} for at in (2, 5, 11)],
}
ACTIONS = ["MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT"]


def _episode(root: Path, names: list[str], texts: object = None, episode: str = "17") -> Path:
    folder = root / "train" / episode
    folder.mkdir(parents=True)
    (folder / "milestones_result.json").write_text(json.dumps(TEXTS if texts is None else texts))
    for name in names:
        (folder / name).touch()
    return folder


def _read(root: Path) -> tuple[list[Sample], list[Problem]]:
    problems: list[Problem] = []
    return list(iter_samples(find_sources(root), on_problem=problems.append)), problems


def _names(count: int) -> list[str]:
    return [f"step_{step:04d}_{ACTIONS[step % 3]}.png" for step in range(count)]


# ---------------------------------------------------------------- sampling


@given(st.integers(0, 100_000), st.integers(2, 64))
@example(122, 15)  # here numpy's quotient, rounded, gives another index than exact arithmetic
def test_history_is_numpy_linspace_once_it_is_longer_than_the_count(step, count):
    expected = list(range(step + 1)) if step < count else np.linspace(0, step, count, dtype=int).tolist()
    assert history_indexes(step, count) == expected


def test_history_of_nine_is_janusvlns_for_all_lengths_of_episode():
    for step in range(3000):
        expected = list(range(step + 1)) if step <= 8 else np.linspace(0, step, 9, dtype=int).tolist()
        assert history_indexes(step) == expected


@given(st.integers(0, 100_000), st.integers(1, 64))
def test_history_ends_with_the_step_itself_and_never_repeats(step, count):
    indexes = history_indexes(step, count)
    assert indexes[-1] == step
    assert indexes == sorted(set(indexes))
    assert len(indexes) == min(step + 1, count)


# ---------------------------------------------------------------- samples


def test_steps_become_samples_of_nine_frames_padded_at_the_front(tmp_path):
    names = _names(12)
    folder = _episode(tmp_path, names[::-1])
    samples, problems = _read(tmp_path)
    assert not problems
    assert len(samples) == 12
    assert samples[0].frames == (names[0],) * 9
    assert samples[2].frames == (names[0],) * 6 + tuple(names[:3])
    assert samples[8].frames == tuple(names[:9])
    assert samples[11].frames == tuple(names[at] for at in np.linspace(0, 11, 9, dtype=int))
    for step, sample in enumerate(samples):
        assert sample.bases == (str(folder),)
        assert sample.source == f"{folder}:{step}"
        assert sample.layout == "episode"
        assert sample.record == {
            "episode": str(folder),
            "step": step,
            "action": ACTIONS[step % 3],
            "sidecar": str(folder / f"{names[step][:-4]}.json"),
        }


def test_names_are_read_in_any_case_and_format_in_the_order_of_their_numbers(tmp_path):
    names = [
        "step_2_turn_left.JPG",
        "STEP_0010_Stop.jpeg",
        "step_0003_MOVE_FORWARD.webp",
        "step_1_TURN_RIGHT.Png",
    ]
    _episode(tmp_path, [*names, "step_0001_TURN_RIGHT.json", "overview.png", "step.txt"])
    samples, problems = _read(tmp_path)
    assert not problems
    assert [(sample.record["step"], sample.record["action"]) for sample in samples] == [
        (1, "TURN_RIGHT"),
        (2, "TURN_LEFT"),
        (3, "MOVE_FORWARD"),
        (10, "STOP"),
    ]
    assert samples[-1].frames[-4:] == (names[3], names[0], names[2], names[1])


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "holds no image called step_<number>_<action>.png"),
        (
            ["step_0000_STOP.png", "step_0_TURN_LEFT.png"],
            "has two images for step 0 (step_0000_STOP.png, step_0_TURN_LEFT.png): remove one",
        ),
        (["step_0000_STOP.png", "step_0000_STOP.jpg"], "has two images for step 0"),
    ],
)
def test_a_folder_that_makes_no_episode_is_one_problem_and_the_others_are_read(tmp_path, names, reason):
    bad = _episode(tmp_path, names, episode="1")
    _episode(tmp_path, _names(3), episode="2")
    samples, problems = _read(tmp_path)
    assert len(samples) == 3
    (problem,) = problems
    assert problem.where == str(bad)
    assert problem.reason.startswith(reason)


def test_an_image_whose_name_gives_no_action_is_told(tmp_path):
    _episode(tmp_path, [*_names(2), "step_0002.png"])
    samples, problems = _read(tmp_path)
    assert len(samples) == 2
    assert "'step_0002.png'" in problems[0].reason


def test_planning_opens_no_text(tmp_path, monkeypatch):
    _episode(tmp_path, _names(3))
    sources = find_sources(tmp_path)
    monkeypatch.setattr("builtins.open", lambda *arguments, **options: pytest.fail(f"opened {arguments}"))
    assert len(list(iter_samples(sources, on_problem=print))) == 3


def test_a_folder_that_goes_away_is_told(tmp_path):
    folder = _episode(tmp_path, _names(1))
    sources = find_sources(tmp_path)
    for name in os.listdir(folder):
        os.unlink(folder / name)
    folder.rmdir()
    problems: list[Problem] = []
    assert not list(iter_samples(sources, on_problem=problems.append))
    assert problems[0].reason.startswith("cannot be listed (No such file or directory)")


# ---------------------------------------------------------------- texts


def test_texts_belong_to_their_step(tmp_path):
    folder = _episode(tmp_path, _names(14))
    words = {"landmark_description": "a sofa", "spatial_description": "2 m ahead"}
    (folder / "step_0003_MOVE_FORWARD.json").write_text("\ufeff" + json.dumps(words))
    texts = [read_episode_text(sample) for sample in _read(tmp_path)[0]]
    assert {text.instruction for text in texts} == {"Walk to the kitchen."}
    parts = TEXTS["subinstructions"]
    assert [text.subinstruction for text in texts] == [parts[0]] * 2 + [parts[1]] * 3 + [parts[2]] * 9
    assert (texts[3].description_2d, texts[3].description_3d) == ("a sofa", "2 m ahead")
    assert (texts[4].description_2d, texts[4].description_3d) == (None, None)


def test_an_episode_without_subinstructions_has_none(tmp_path):
    _episode(tmp_path, _names(2), {"instruction_text": "go"})
    assert read_episode_text(_read(tmp_path)[0][1]).subinstruction is None


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "has no instruction_text"),
        ({"instruction_text": ""}, "has no instruction_text"),
        ({"instruction_text": 5}, "has a int as instruction_text where a text is expected"),
        ([], "holds no JSON object"),
        ({"instruction_text": "go", "subinstructions": [5]}, "has subinstructions that are not texts"),
        ({"instruction_text": "go", "subinstructions": 5}, "has subinstructions that are not texts"),
        ({"instruction_text": "go", "completion_checkpoints": [{}]}, "completion_checkpoints without"),
        ({"instruction_text": "go", "completion_checkpoints": [3]}, "completion_checkpoints without"),
        (
            {"instruction_text": "go", "completion_checkpoints": [{"checkpoint_frame_index": "3"}]},
            "completion_checkpoints without",
        ),
    ],
)
def test_milestones_that_cannot_be_used_are_refused_by_name(tmp_path, texts, reason):
    folder = _episode(tmp_path, _names(1), texts)
    sample = _read(tmp_path)[0][0]
    with pytest.raises(DataError) as refusal:
        read_episode_text(sample)
    assert str(refusal.value).startswith(f"{folder}/milestones_result.json ")
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{oops", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("17", "holds no JSON object"),
        ('{"landmark_description": ["a"]}', "has a list as landmark_description"),
    ],
)
def test_a_sidecar_that_cannot_be_used_is_refused_by_name(tmp_path, content, reason):
    folder = _episode(tmp_path, _names(1))
    sidecar = folder / "step_0000_MOVE_FORWARD.json"
    sidecar.write_text(content)
    with pytest.raises(DataError) as refusal:
        read_episode_text(_read(tmp_path)[0][0])
    assert str(refusal.value).startswith(f"{sidecar} ")
    assert reason in str(refusal.value)

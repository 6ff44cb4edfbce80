"""Data as users bring it, through the command line: what is said, what is computed, and the exit code."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from small_data import SIZE, write_image
from vggt_cache.cli import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a", "b", "c"):
        write_image(tmp_path / "data" / f"{name}.png", ord(name))
    return tmp_path / "data"


def precompute(
    capsys, checkpoint, root: Path, *flags: object, data: tuple[object, ...] = ()
) -> tuple[int, str]:
    data = data or ("--data_root", root)
    arguments = [
        "precompute",
        "--vggt_model_path",
        checkpoint,
        *data,
        "--cache_dir",
        root.parent / "cache",
        *SIZE,
    ]
    code = main([*map(str, arguments), *map(str, flags)])
    out, err = capsys.readouterr()
    return code, out + err


def put(root: Path, name: str, *frames: str) -> None:
    (root / name).write_text("".join(json.dumps({"images": [frame]}) + "\n" for frame in frames))


def test_files_that_are_left_out_are_told_beside_what_is_computed(root, small_checkpoint, capsys):
    put(root, "main.jsonl", "a.png")
    (root / "more.jsonl.gz").write_bytes(gzip.compress(b'{"images": ["b.png"]}\n'))
    (root / "late.json").write_text(json.dumps([{"x": 1}] * 9 + [{"images": ["c.png"]}]), "utf-16")
    (root / "episodes.json").write_text('{"episodes": [{"episode_id": 1}]}')
    code, said = precompute(capsys, small_checkpoint, root)
    assert code == 0
    assert "Found 2 JSONL files" in said
    assert "Processed 3 images" in said
    reason = "is one JSON object, not a list of samples or JSON Lines"
    assert f"[INFO] left out: {root / 'episodes.json'} ({reason})" in said


def test_where_no_file_is_used_the_refusal_says_why(root, small_checkpoint, capsys):
    (root / "episodes.json").write_text('{"episodes": [{"episode_id": 1}]}')
    code, said = precompute(capsys, small_checkpoint, root)
    assert code == 2
    assert f"left out: {root / 'episodes.json'} (is one JSON object" in said


def test_annotation_files_and_a_folder_of_images_are_read_as_by_the_trainer(root, small_checkpoint, capsys):
    (root / "train").mkdir()
    put(root / "train", "x.json", "a.png", "b.png")
    (root / "media").mkdir()
    for name in ("a.png", "b.png"):
        (root / name).rename(root / "media" / name)
    data = ("--annotation_path", root / "train" / "x.json", "--data_path", root / "media")
    code, said = precompute(capsys, small_checkpoint, root, data=data)
    assert code == 0
    assert "Processed 2 images" in said
    cache = str(root.parent / "cache")
    assert main(["verify", cache, *map(str, data)]) == 0
    assert "Verification: 2/2 valid, 0 invalid" in capsys.readouterr().out
    assert main(["precompute", "--verify", "--cache_dir", cache, *map(str, data)]) == 0
    assert "Verification: 2/2 valid, 0 invalid" in capsys.readouterr().out
    assert main(["view", cache, *map(str, data), "--output", str(root.parent / "x.png")]) == 0
    assert "Drew 2 features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ([], "--data_root is missing"),
        (
            ["--data_root", ".", "--annotation_path", "x.json"],
            "--data_root is . and --annotation_path is x.json: give",
        ),
        (["--data_root", ".", "--data_path", "x"], "--data_path x goes with --annotation_path"),
        (["--annotation_path", "nowhere.json"], "--annotation_path nowhere.json does not exist"),
    ],
)
def test_what_names_no_data_is_refused_in_one_sentence(root, small_checkpoint, capsys, data, sentence):
    arguments = ["precompute", "--vggt_model_path", str(small_checkpoint), "--cache_dir", str(root / "cache")]
    assert main([*arguments, *data]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert "Traceback" not in err


def test_16_bit_grey_is_one_warning_a_run(root, small_checkpoint, capsys):
    for name in ("a", "b"):
        Image.fromarray(np.full((48, 64), 1500, np.uint16)).save(root / f"{name}.png")
    put(root, "x.jsonl", "a.png", "b.png", "c.png")
    code, said = precompute(capsys, small_checkpoint, root, "--dry_run")
    assert (code, said.count("values over 255 are white; a depth map?")) == (0, 1), "told before it is begun"
    code, said = precompute(capsys, small_checkpoint, root)
    assert code == 0
    assert said.count("values over 255 are white; a depth map?") == 1
    assert f"(the first: {str(root / 'a.png')!r})" in said


def test_a_list_in_the_order_of_letters_is_one_warning_where_lists_matter(root, small_checkpoint, capsys):
    for number in (2, 10):
        write_image(root / f"frame_{number}.png", number)
    (root / "x.json").write_text(json.dumps([{"images": ["frame_10.png", "frame_2.png"]}] * 2))
    code, said = precompute(capsys, small_checkpoint, root, "--context", "causal")
    assert code == 0
    assert said.count("in the order of letters, not of numbers") == 1
    assert "[WARN] 2 lists of frames" in said
    code, said = precompute(capsys, small_checkpoint, root, "--context", "frame")
    assert "order of letters" not in said


def test_a_sample_that_speaks_of_frames_and_names_none_is_told(root, small_checkpoint, capsys):
    (root / "x.json").write_text(json.dumps([{"images": ["a.png"]}, {"video": "v.mp4", "conversations": []}]))
    code, said = precompute(capsys, small_checkpoint, root)
    assert code == 3
    assert f"[WARN] {root / 'x.json'}:2: has video but names no frame" in said


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain name.png", "{root}/plain name.png"),
        ("起点.png", "{root}/起点.png"),
        ("blank.png ", "'{root}/blank.png '"),
        ("ep1\\0.png", "'{root}/ep1\\\\0.png'"),
        ("two\nlines.png", "'{root}/two\\nlines.png'"),
    ],
)
def test_a_name_that_could_be_taken_for_another_is_quoted(root, small_checkpoint, capsys, name, shown):
    put(root, "x.jsonl", "a.png", name)
    shown = shown.format(root=root)
    code, said = precompute(capsys, small_checkpoint, root, "--verify")
    assert code == 3
    assert f"[WARN] 1 image does not exist: the first is {shown}; " in said
    assert f"[WARN] {shown}: it does not exist" in said
    assert f"[WARN] invalid: {shown}: " in said

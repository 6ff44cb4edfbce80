"""What goes wrong on the user's side costs itself alone, is told as it is, and is never a traceback."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from small_data import SIZE, command_line, write_annotations, write_episode, write_image
from trials.toy_encoder import ToyCheckpoint, toy_encoder
from vggt_cache.cli import main
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.report import standing_failures

Run = Callable[..., tuple[int, str, str]]


class SmallDevice(ToyCheckpoint):
    """Has room for lists of four frames, and for one image at a time that is higher than the others."""

    def list_feature(self, frames: Sequence[Tensor]) -> Tensor:
        if len(frames) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().list_feature(frames)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One episode of six steps; step n has seen those before it."""
    root = tmp_path / "数据 1"
    names = write_episode(root, "第一集", 6)
    write_annotations(root / "train.jsonl", [names[: step + 1] for step in range(6)])
    time.sleep(0.06)  # the images' digests are kept: they are older than the clock's tick
    return root


@pytest.fixture
def run(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*flags: object, encoder: ToyCheckpoint | None = None) -> tuple[int, str, str]:
        given = [
            "precompute",
            "--vggt_model_path",
            "toy",
            "--data_root",
            data,
            "--cache_dir",
            tmp_path / "cache",
        ]
        with toy_encoder(encoder or ToyCheckpoint()):
            code = main([*map(str, given), *SIZE, *map(str, flags)])
        return code, *capsys.readouterr()

    return command


# ---------------------------------------------------------------- a list, an image


def test_a_list_that_does_not_fit_costs_itself_and_is_named_with_its_length(
    run: Run, data: Path, tmp_path: Path
):
    code, out, _ = run("--context", "causal", encoder=SmallDevice())
    assert code == 3
    assert "Processed 4 features" in out
    for earlier in (4, 5):
        label = f"{data}/第一集/{earlier:04d}.png (after {earlier} earlier frames)"
        assert out.count(f"[WARN] {label}: its list of {earlier + 1} frames does not fit") == 1
    listed = [json.loads(line) for line in (tmp_path / "cache" / "failures.jsonl").read_text().splitlines()]
    assert {entry["path"].partition(" (")[0] for entry in listed} == {
        str(data / "第一集" / f"{number:04d}.png") for number in (4, 5)
    }
    assert run("--context", "causal", "--verify")[0] == 0, "on a larger device what was left out is computed"
    assert standing_failures(str(tmp_path / "cache")) == {}


def test_the_batch_recovers_from_what_did_not_fit() -> None:
    halved: list[int] = []
    batches = BatchEncoder(SmallDevice(), 8, halved.append, leave_out=True)  # type: ignore[arg-type]
    pixels = {frame: np.full((14, 14, 3), frame, np.uint8) for frame in range(6)}
    from unittest import mock

    from trials.toy_encoder import toy_lists
    from vggt_cache.precompute import encode

    with mock.patch.object(encode, "encode_lists", toy_lists):
        found = [at for part, _ in batches.lists([[0], [0, 1, 2, 3, 4, 5], [1, 2]], pixels) for at in part]
    assert (sorted(found), batches.too_large) == ([0, 2], [1])
    assert (halved, batches.batch_size) == ([4, 2, 1], 8)


def test_a_batch_that_was_halved_for_a_while_grows_again_and_tries_ever_more_rarely() -> None:
    class Device(ToyCheckpoint):
        room = 2

        def frame_features(self, pixels: Tensor) -> Tensor:
            if len(pixels) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().frame_features(pixels)

    halved: list[int] = []
    device = Device()
    batches = BatchEncoder(device, 8, halved.append, leave_out=True)  # type: ignore[arg-type]
    frames = [np.zeros((14, 14, 3), np.uint8)] * 8
    for _ in range(100):
        assert sum(len(part) for part, _ in batches.frames(frames)) == 8
    assert batches.batch_size == 2
    assert len(halved) <= 10, "each attempt waits twice as long as the one before"
    device.room = 8
    for _ in range(300):
        list(batches.frames(frames))
    assert batches.batch_size == 8


def test_an_image_too_large_costs_itself_and_a_full_device_ends_the_run() -> None:
    class Device(ToyCheckpoint):
        most_pixels = 14 * 14

        def frame_features(self, pixels: Tensor) -> Tensor:
            if pixels[..., 0].numel() > self.most_pixels:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().frame_features(pixels)

    from vggt_cache.errors import OutOfMemoryError

    device = Device()
    batches = BatchEncoder(device, 2, leave_out=True)  # type: ignore[arg-type]
    frames = [np.zeros((28, 14, 3), np.uint8), np.zeros((14, 14, 3), np.uint8)]
    assert [part for part, _ in batches.frames(frames)] == [[1]]
    assert batches.too_large == [0]
    device.most_pixels = 0
    with pytest.raises(OutOfMemoryError, match="a batch of one frame"):
        list(batches.frames(frames))


# ---------------------------------------------------------------- estimates


def test_images_that_do_not_exist_are_told_and_no_disk_is_asked_for_them(run: Run, data: Path, monkeypatch):
    for number in (1, 3, 5):
        (data / "第一集" / f"{number:04d}.png").unlink()
    told = f"[WARN] 3 images do not exist: the first is {data}/第一集/0001.png, all below {data}/第一集; 3 images"
    code, out, _ = run("--dry_run")
    assert code == 3
    assert told in out
    assert "for 3 images of" in out
    needed = 3 * 3 * 4 * 4 * 2
    monkeypatch.setattr("vggt_cache.precompute.estimate.free_bytes", lambda directory: int(needed * 1.5))
    code, out, _ = run()
    assert code == 3, "what there is fits, and is computed"
    assert told in out
    assert "Processed 3 images" in out


def test_where_no_image_exists_a_dry_run_says_so_and_gives_no_figure(run: Run, data: Path):
    shutil.rmtree(data / "第一集")
    code, out, _ = run("--dry_run")
    assert code == 3
    assert "[WARN] 6 images do not exist" in out
    assert "Disk: 0 B" not in out


@pytest.mark.parametrize("dry", [False, True])
def test_images_that_were_only_touched_are_hashed_before_anything_is_refused(
    run: Run, data: Path, monkeypatch, dry
):
    assert run()[0] == 0
    for path in data.rglob("*.png"):
        os.utime(path, (1, 1))
    time.sleep(0.06)
    monkeypatch.setattr("vggt_cache.precompute.estimate.free_bytes", lambda directory: 10)
    code, out, err = run(*(["--dry_run"] if dry else []))
    assert (code, err.count("[ERROR]")) == (0, 0)
    assert "[INFO] Reading 6 images" in out
    assert "[INFO] Unique images to process: 0" in out


# ---------------------------------------------------------------- output, failures.jsonl


def test_verification_shows_a_hundred_lines_and_counts_the_rest(tmp_path: Path, run: Run, data: Path, capsys):
    assert run()[0] == 0
    names = [f"gone/{number}.png" for number in range(150)]
    write_annotations(data / "more.jsonl", [[name] for name in names])
    code = main(["verify", str(tmp_path / "cache"), "--data_root", str(data)])
    out = capsys.readouterr().out
    assert code == 1
    assert out.count("[WARN] invalid: ") == 100
    assert out.count("more than 100 such lines: the others are only counted") == 1
    assert "Verification: 6/156 valid, 150 invalid" in out


def test_prune_shows_a_hundred_lines_and_counts_the_rest(tmp_path: Path, run: Run, data: Path, capsys):
    assert run()[0] == 0
    for number in range(120):
        (next(tmp_path.glob("cache/frame-*/shards")) / f".tmp-{number:016x}").touch()
    main(["prune", str(tmp_path / "cache"), "--spec", next((tmp_path / "cache").glob("frame-*")).name[6:]])
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("would remove") for line in out) == 100
    assert "more" in out[-2]


def test_failures_that_are_mended_no_longer_stand_in_the_list(run: Run, data: Path, tmp_path: Path, capsys):
    image, cache = data / "第一集" / "0002.png", str(tmp_path / "cache")
    good = image.read_bytes()
    image.write_bytes(b"no image")
    with open(data / "train.jsonl", "a") as file:
        file.write('{"images": [7]}\n')
    assert run()[0] == 3
    assert [path for _, path in standing_failures(cache)] == [f"{data}/train.jsonl:7", str(image)]
    image.write_bytes(good)
    code, out, _ = run()
    assert code == 3
    assert "[INFO] 1 earlier failure in failures.jsonl mended since" in out
    assert [path for _, path in standing_failures(cache)] == [f"{data}/train.jsonl:7"]
    main(["info", cache])
    assert "1 input could not be used when last tried" in capsys.readouterr().out
    image.write_bytes(b"no image")
    assert run("--no-skip_existing")[0] == 3
    assert len(standing_failures(cache)) == 2, "what fails again stands there again"


def test_failures_are_mended_under_another_name_of_the_data_too(run: Run, data: Path, tmp_path: Path):
    image, link = data / "第一集" / "0002.png", tmp_path / "link"
    good = image.read_bytes()
    link.symlink_to(data)
    image.write_bytes(b"no image")
    assert run("--data_root", link)[0] == 3
    image.write_bytes(good)
    assert run()[0] == 0
    assert standing_failures(str(tmp_path / "cache")) == {}


def test_names_in_the_list_of_failures_stand_as_they_are(run: Run, data: Path, tmp_path: Path):
    (data / "第一集" / "0002.png").write_bytes(b"no image")
    with open(data / "train.jsonl", "a") as file:
        file.write('{"images": ["\\udcff.png"]}\n')  # a name that is no UTF-8
    assert run()[0] == 3
    listed = (tmp_path / "cache" / "failures.jsonl").read_text("utf-8")
    assert f'"{data}/第一集/0002.png"' in listed
    assert {Path(path).name for _, path in standing_failures(str(tmp_path / "cache"))} == {
        "0002.png",
        "\udcff.png",
    }


# ---------------------------------------------------------------- commands and bad situations

DATA, CACHE = "DATA", "CACHE"
PRECOMPUTE = ["precompute", "--vggt_model_path", "toy", "--data_root", DATA, "--cache_dir", CACHE, *SIZE]
COMMANDS: dict[str, list[str]] = {
    "precompute": PRECOMPUTE,
    "precompute --dry_run": [*PRECOMPUTE, "--dry_run"],
    "precompute --verify": ["precompute", "--verify", "--data_root", DATA, "--cache_dir", CACHE],
    "info": ["info", CACHE],
    "verify": ["verify", CACHE],
    "verify data": ["verify", CACHE, "--data_root", DATA],
    "view": ["view", CACHE, "--data_root", DATA, "-o", "picture.png"],
    "prune": ["prune", CACHE, "--yes"],
    "convert": ["convert", CACHE, "--codec", "none", "--yes"],
    "doctor": ["doctor", CACHE],
}
READERS = [name for name in COMMANDS if name not in ("precompute", "precompute --dry_run", "doctor")]


def _dangling(cache: Path) -> None:
    cache.symlink_to("nowhere")


def _looping(cache: Path) -> None:
    cache.symlink_to(cache.name)


def _file(cache: Path) -> None:
    cache.write_bytes(b"")


def _through_a_file(cache: Path) -> None:
    cache.parent.rmdir()
    cache.parent.write_bytes(b"")


BAD_PLACES = {
    ("nothing", lambda cache: None): READERS,
    ("an empty directory", Path.mkdir): READERS,
    ("a dangling link", _dangling): list(COMMANDS),
    ("a link to itself", _looping): list(COMMANDS),
    ("a file", _file): list(COMMANDS),
    ("a file as the parent", _through_a_file): list(COMMANDS),
}
CASES = [(name, place, make) for (place, make), names in BAD_PLACES.items() for name in names]


@pytest.mark.parametrize(("command", "place", "make"), CASES, ids=[f"{one[0]}: {one[1]}" for one in CASES])
def test_a_cache_directory_that_is_none_is_one_sentence_and_exit_code_2(
    tmp_path: Path, data: Path, monkeypatch, capsys, command: str, place: str, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "place" / "cache"
    cache.parent.mkdir()
    make(cache)
    with toy_encoder(ToyCheckpoint()):
        code = main([{DATA: str(data), CACHE: str(cache)}.get(word, word) for word in COMMANDS[command]])
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("[ERROR]")]
    assert (code, len(err)) == (2, 1), err
    assert str(cache) in err[0] or str(cache.parent) in err[0]


@pytest.mark.parametrize("command", ["precompute", "precompute --dry_run", "precompute --verify", "prune"])
def test_a_name_that_is_empty_is_not_the_present_directory(
    tmp_path: Path, data: Path, run: Run, monkeypatch, capsys, command: str
) -> None:
    """As of a variable that is not set; a cache lies in the present directory."""
    assert run()[0] == 0
    monkeypatch.chdir(tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    with toy_encoder(ToyCheckpoint()):
        try:
            code = main([{DATA: str(data), CACHE: ""}.get(word, word) for word in COMMANDS[command]])
        except SystemExit as ended:
            code = ended.code
    assert (code, capsys.readouterr().err.count("[ERROR]")) == (2, 1)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["verify", CACHE], "data_root"),
        (["verify", CACHE], "data_path"),
        (["precompute", "--verify", "--cache_dir", CACHE], "annotation_path"),
    ],
)
def test_data_without_a_name_is_not_verified_as_no_data(
    tmp_path: Path, run: Run, capsys, command: list[str], name: str
) -> None:
    """Every record would be valid, and nothing be known of the data."""
    assert run()[0] == 0
    code = main([*(str(tmp_path / "cache") if word == CACHE else word for word in command), f"--{name}", ""])
    assert (code, capsys.readouterr().err.count("[ERROR]")) == (2, 1)


def test_a_model_without_a_name_is_not_passed_over(run: Run) -> None:
    code, _, err = run("--model_path", "")
    assert code == 2
    assert "[ERROR] --model_path : config.json cannot be read" in err


@pytest.mark.parametrize(
    ("command", "descriptors"),
    [
        ("verify", 8),
        ("precompute --verify", 24),
        *(
            pytest.param(name, 24, marks=pytest.mark.slow)
            for name in ("info", "verify", "prune", "convert", "view")
        ),
        pytest.param("info", 8, marks=pytest.mark.slow),
    ],
)
def test_too_few_descriptors_are_never_a_traceback(
    tmp_path: Path, run: Run, data: Path, command: str, descriptors: int
) -> None:
    assert run()[0] == 0
    words = [{DATA: str(data), CACHE: str(tmp_path / "cache")}.get(word, word) for word in COMMANDS[command]]
    done = subprocess.run(
        command_line(words),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors)),
    )
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2), done.stderr


@pytest.mark.parametrize("command", ["info", "verify", "view", "prune", "precompute", "precompute --verify"])
def test_an_error_of_the_system_that_nobody_expected_is_a_sentence(
    tmp_path: Path, run: Run, data: Path, monkeypatch, capsys, command: str
) -> None:
    """Whatever call it is that fails: here the one that every command makes."""
    assert run()[0] == 0
    monkeypatch.setattr("vggt_cache.store.directory.os.listdir", _full, raising=True)
    monkeypatch.setattr("os.scandir", _full)
    monkeypatch.chdir(tmp_path)
    words = [{DATA: str(data), CACHE: str(tmp_path / "cache")}.get(word, word) for word in COMMANDS[command]]
    with toy_encoder(ToyCheckpoint()):
        code = main(words)
    err = capsys.readouterr().err
    assert (code, err.count("[ERROR]")) == (2, 1), err


def _full(*given: object, **options: object) -> None:
    raise OSError(24, "Too many open files")


# ---------------------------------------------------------------- small things


def test_images_that_training_never_reads_are_told_of(run: Run, data: Path) -> None:
    assert "only history" not in run()[1], "each image is the last one of a sample"
    write_episode(data, "历史", 2, seed=7)
    write_annotations(data / "more.jsonl", [["历史/0000.png", "历史/0001.png"]])
    assert "[INFO] Images that are only history of samples: 1;" in run()[1]


@pytest.mark.parametrize(
    ("given", "meant"), [("--batchsize", "--batch_size"), ("--dataRoots", "--data_root")]
)
def test_a_flag_that_is_nearly_right_is_answered_with_the_right_one(capsys, given: str, meant: str) -> None:
    words = ["precompute", "--data_root", "x", "--cache_dir", "y", given, "8"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {given}" in (said := capsys.readouterr().err)
    assert f"(did you mean {meant}?)" in said


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("x.png", "PNG"), ("x", "PNG")])
def test_a_picture_has_the_format_of_its_name(
    run: Run, data: Path, tmp_path: Path, capsys, name: str, kind: str
):
    write_image(data / "第一集" / "0001.png", 1, size=(64, 96))
    run()
    code = main(["view", str(tmp_path / "cache"), "--data_root", str(data), "-o", str(tmp_path / name)])
    assert code == 0
    with Image.open(tmp_path / name) as image:
        assert image.format == kind


def test_a_picture_of_an_unknown_format_is_refused_before_anything_is_read(
    run: Run, data: Path, tmp_path, capsys
):
    run()
    assert main(["view", str(tmp_path / "cache"), "--data_root", str(data), "-o", "x.txt"]) == 2
    assert ".txt is no format" in capsys.readouterr().err


def test_a_causal_picture_shows_the_frames_that_were_seen(tmp_path: Path):
    from vggt_cache.picture import Row, draw_features

    feature = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    own, red = np.zeros((56, 56, 3), np.uint8), np.zeros((56, 56, 3), np.uint8)
    red[..., 0] = 255
    draw_features([Row(own, feature, "a (after 2 earlier frames)", [red, red])], tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    is_red = (pixels == (255, 0, 0)).all(axis=2)[64:, :]  # below frame and feature
    assert is_red.sum() == 2 * 32 * 32


def test_a_caption_in_chinese_can_be_told_from_another(tmp_path: Path):
    from vggt_cache.picture import draw_features

    feature = np.random.default_rng(0).normal(size=(4, 4, 8)).astype(np.float32)
    own = np.zeros((56, 112, 3), np.uint8)
    for name, caption in (("a", "第一集/前.png"), ("b", "第二集/后.png")):
        draw_features([(own, feature, caption)], tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_the_demos_last_lines_are_commands_that_work(monkeypatch) -> None:
    from vggt_cache.demo.run import _this_command

    monkeypatch.setattr("sys.argv", ["pytest"])
    done = subprocess.run([*_this_command(), "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("vggt-feature-cache ")
    monkeypatch.setattr("sys.argv", ["/my venv/bin/vggt-cache", "demo"])
    assert _this_command() == ["/my venv/bin/vggt-cache"]

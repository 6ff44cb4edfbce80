"""`vggt_cache.precompute`: anybody's frame lists become features that are found by their files and by their pixels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import vggt_cache
from small_data import write_episode
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.encoder import Checkpoint
from vggt_cache.errors import SettingsError
from vggt_cache.frames import decode_frame
from vggt_cache.precompute import lists as module
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.estimate import pays_sentence
from vggt_cache.precompute.lists import Precomputed
from vggt_cache.store import list_stores

SMALL: dict[str, Any] = {
    "context": "joint",
    "image_size": 56,
    "device": "cpu",
    "num_workers": 0,
    "feature_dtype": "float32",
}


@pytest.fixture
def fill(tmp_path: Path, small_checkpoint: Path) -> Any:
    def call(lists: Any, **settings: Any) -> Precomputed:
        made: Precomputed = vggt_cache.precompute(
            lists, tmp_path / "cache", encoder=small_checkpoint, **{**SMALL, **settings}
        )
        return made

    return call


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [tmp_path / name for name in write_episode(tmp_path, "ep", 4)]


def pixels(path: Path) -> np.ndarray:
    return decode_frame(path.read_bytes(), vggt_cache.Preprocessing(image_size=56))


def reference(small_checkpoint: Path, frames: list[np.ndarray]) -> torch.Tensor:
    """By the encoder itself, of pixels [H, W, 3]."""
    encoder = Checkpoint.open(str(small_checkpoint)).load()
    tokens = encoder.patch_tokens(torch.from_numpy(np.stack(frames)))
    return encoder.joint_features(tokens[None])[0]


def stored(tmp_path: Path, frames: list[Any], context: str = "joint") -> torch.Tensor:
    specs = [spec for spec in list_stores(tmp_path / "cache") if spec.context == context]
    with FeatureCache.open(tmp_path / "cache", spec=specs[0]) as cache:
        return cache.get(frames, strict=True)


@pytest.mark.parametrize(
    "form", ["paths", "names", "bytes", "PIL", "arrays", "floats", "tensor", "mixed", "generators"]
)
def test_every_form_of_frames_gives_the_encoders_feature(
    form: str, fill: Any, paths: list[Path], tmp_path: Path, small_checkpoint: Path
) -> None:
    seen = [pixels(path) for path in paths[:3]]
    as_tensor = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2)
    frames: dict[str, Any] = {
        "paths": paths[:3],
        "names": [f"ep/{path.name}" for path in paths[:3]],
        "bytes": [path.read_bytes() for path in paths[:3]],
        "PIL": [Image.open(path).convert("RGB") for path in paths[:3]],
        "arrays": seen,
        "floats": list(as_tensor.float() / 255),
        "tensor": as_tensor,
        "mixed": [paths[0], seen[1], Image.open(paths[2]).convert("RGB")],
        "generators": (frame for frame in seen),
    }
    result = fill((one for one in [frames[form]]), data_path=str(tmp_path))
    assert result == Precomputed(computed=1, failures=())
    expected = reference(small_checkpoint, seen)
    by_files = [paths[:3]] if form in ("paths", "names") else []
    for asked in (*by_files, seen, as_tensor.float() / 255):
        torch.testing.assert_close(stored(tmp_path, list(asked)), expected, rtol=0, atol=1e-5)


def test_what_is_stored_by_files_or_by_pixels_is_not_computed_again(fill: Any, paths: list[Path]) -> None:
    seen = [[pixels(path) for path in some] for some in (paths[:2], paths[1:4])]
    assert fill([paths[:2]]).computed == 1
    assert fill(seen).computed == 1
    assert fill([paths[:2], paths[1:4], *seen]).computed == 0


@pytest.mark.parametrize(("context", "features"), [("frame", 4), ("causal", 3), ("joint", 3)])
def test_equal_lists_and_frames_are_computed_once_in_every_context(
    context: str, features: int, fill: Any, paths: list[Path]
) -> None:
    seen = [pixels(path) for path in paths]
    assert fill([seen[:1], seen[:2], seen, seen], context=context).computed == features


def test_windows_of_pixels_follow_each_other_and_the_result_is_the_same(
    fill: Any, paths: list[Path], tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = [pixels(path) for path in paths]
    monkeypatch.setattr(module, "WINDOW_BYTES", seen[0].nbytes * 2)
    held: list[int] = []

    def lists() -> Iterator[list[np.ndarray]]:
        for at in range(4):
            held.append(at)
            yield [seen[at], seen[0]]

    begun: list[list[int]] = []
    monkeypatch.setattr(
        module.Job,
        "begin",
        lambda self, *plan, real=module.Job.begin: (begun.append(held[:]), real(self, *plan)),
    )
    assert fill(lists()).computed == 4
    assert begun == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    for at in range(4):
        expected = reference(small_checkpoint, [seen[at], seen[0]])
        torch.testing.assert_close(stored(tmp_path, [seen[at], seen[0]]), expected, rtol=0, atol=1e-5)


def test_frames_of_whole_levels_share_batches_with_others_and_keep_their_values(
    fill: Any, paths: list[Path], tmp_path: Path, small_checkpoint: Path
) -> None:
    """Such as a frame that was decoded beside one that was resized as floats."""
    whole = pixels(paths[0])
    between = (pixels(paths[1]).astype(np.float32) / 255) ** 1.5
    for context in ("frame", "causal", "joint"):
        fill([[whole, between]], context=context)
    got = stored(tmp_path, [whole, between])
    expected = reference(small_checkpoint, [whole.astype(np.float32) / np.float32(255), between])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    encoder = Checkpoint.open(str(small_checkpoint)).load()
    alone = next(iter(BatchEncoder(encoder, 1).frames([whole])))[1][0]
    torch.testing.assert_close(stored(tmp_path, [whole], "frame"), alone, rtol=0, atol=1e-5)


def test_a_list_that_cannot_be_used_costs_itself_and_is_named(
    fill: Any, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = [pixels(path) for path in paths]
    (tmp_path / "bad.png").write_bytes(b"not an image")
    result = fill(
        [[seen[0], seen[1][:, :28]], [seen[2], tmp_path / "bad.png"], [tmp_path / "bad.png"], [seen[3]]]
    )
    assert result.computed == 1
    assert len(result.failures) == 3
    assert {"list 1", str(tmp_path / "bad.png")} < set(result.failures)
    out = capsys.readouterr().out
    assert re.search(
        r"\[WARN\] list 0, frame 1 \(pixels [0-9a-f]{16}\) \(after 1 earlier frames\): its frames have", out
    )
    assert "failures.jsonl" not in out


@pytest.mark.parametrize(
    ("lists", "settings", "said"),
    [
        (["a.png"], {}, "list 0, counted from 0, is a str and no list: give an ordered list of frames"),
        (
            [[np.zeros((30, 28, 3), np.uint8)]],
            {},
            "in list 0, counted from 0, a frame is given as 30 x 28 pixels",
        ),
        ([[np.zeros((28, 28), np.uint8)]], {}, "in list 0, counted from 0, a frame is a tensor [28, 28]"),
        ([[3]], {}, "in list 0, counted from 0, a frame is of type int"),
        ([], {"data_root": "x"}, "data_root was given with lists"),
        ([], {"image_size": 15}, "image_size is 15"),
    ],
)
def test_what_is_no_list_of_frames_is_refused_in_a_sentence(
    lists: Any, settings: dict[str, Any], said: str, fill: Any
) -> None:
    with pytest.raises(SettingsError) as caught:
        fill(lists, **settings)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_verb_is_the_librarys_whatever_was_imported_first() -> None:
    import vggt_cache.precompute.run

    assert callable(vggt_cache.precompute)
    from vggt_cache import precompute

    assert precompute is vggt_cache.precompute
    assert vggt_cache.precompute.run is not None  # type: ignore[attr-defined]


# ---------------------------------------------------------------- does it pay


def test_the_break_even_is_bytes_over_the_encoders_time() -> None:
    said = pays_sentence(33_900_000, 2 * 2**40, "63000 features", 0.11, "NVIDIA H100")
    assert said == (
        "A sample reads 33.9 MB, 63000 features are 2.0 TiB, and the encoder takes 110.0 ms for a sample on NVIDIA "
        "H100: the cache pays where each such device reads more than 308 MB/s from it; below that, reading is slower "
        "than computing"
    )
    assert "1 feature is 2.0 TiB" in pays_sentence(33_900_000, 2 * 2**40, "1 feature", 0.11, "NVIDIA H100")


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("context", "frames"), [("causal", 1), ("joint", 4)])
def test_a_run_and_a_dry_run_say_below_which_speed_reading_is_slower(
    dry: bool,
    context: str,
    frames: int,
    fill: Any,
    paths: list[Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the time of the encoder: a clock that moves while it encodes, and else stands still."""
    clock = [0.0]
    monkeypatch.setattr("vggt_cache.precompute.engine.time.perf_counter", lambda: clock[0])
    for name in ("lists", "joint_lists"):
        real = getattr(BatchEncoder, name)

        def slow(self: BatchEncoder, *given: Any, real: Any = real) -> Any:
            clock[0] += 0.5
            return real(self, *given)

        monkeypatch.setattr(BatchEncoder, name, slow)
    fill([paths], context=context, dry_run=dry)
    (line,) = re.findall(r"\[INFO\] A sample reads (.*)", capsys.readouterr().out)
    size = frames * 3 * 4 * 2 * 384 * 4
    assert line.startswith(f"{size / 1e6:.2f} MB, 1 feature is ")
    assert "the encoder takes 500.0 ms for a sample on cpu" in line
    assert f"reads more than {size / 0.5 / 1e6:.2f} MB/s" in line


def test_the_command_says_it_too_and_nothing_where_all_is_stored(
    fill: Any, paths: list[Path], tmp_path: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"images": ["ep/0000.png"], "conversations": []}\n')
    command = [
        "precompute",
        "--vggt_model_path",
        str(small_checkpoint),
        "--annotation_path",
        str(tmp_path / "a.jsonl"),
    ]
    command += [
        "--cache_dir",
        str(tmp_path / "c"),
        "--image_size",
        "56",
        "--device",
        "cpu",
        "--num_workers",
        "0",
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert 0 < out.index("A sample reads ") < out.index("[SUCCESS] Processed")
    assert main(command) == 0
    assert "A sample reads " not in capsys.readouterr().out

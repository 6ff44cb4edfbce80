"""The recipes run as they stand in the page, on small data; foreign packages and the trainer's step are stand-ins."""

from __future__ import annotations

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from small_data import write_image
from vggt_cache.precompute import lists as module

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
RECIPE = re.compile(r"^## (.+?)\n.*?```python\n(.*?)```", re.DOTALL | re.MULTILINE)
RECIPES = dict(RECIPE.findall(PAGE.read_text()))


class Video:
    """What decord's reader gives, of a file that holds the number of its frames."""

    def __init__(self, path: str) -> None:
        self.count = int(Path(path).read_text())

    def __len__(self) -> int:
        return self.count

    def get_batch(self, indexes: Any) -> Any:
        frames = np.stack([np.full((28, 42, 3), at, np.uint8) for at in indexes])
        return SimpleNamespace(asnumpy=lambda: frames)


def channels_first(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(frames).movedim(-1, -3).float() / 255


@pytest.fixture
def run(tmp_path: Path, small_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a recipe; returns its lists, the settings it gave, and what was done."""
    trainer, decord, zarr = (ModuleType(name) for name in ("your_trainer", "decord", "zarr"))
    shades = [torch.full((3, 28, 28), at / 255) for at in range(3)]
    images = np.stack([np.full((28, 28, 3), at, np.uint8) for at in range(5)])
    stand_ins: dict[ModuleType, dict[str, Any]] = {
        trainer: {"prepare": channels_first, "dataset": [{"geometry_encoder_inputs": shades}]},
        decord: {"VideoReader": Video},
        zarr: {"open": lambda path, mode: {"data/img": images}},
    }
    for stand_in, names in stand_ins.items():
        vars(stand_in).update(names)
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    real = module.precompute

    def call(heading: str) -> tuple[list[list[Any]], dict[str, Any], Any]:
        seen: list[Any] = []

        def small(lists: Any, cache_dir: str, **settings: Any) -> None:
            held = [list(frames) for frames in lists]
            smaller = {"encoder": small_checkpoint, "image_size": 28, "device": "cpu", "num_workers": 0}
            if "layers" in settings:
                smaller["layers"] = "0,1"
            seen.append((held, settings, real(held, cache_dir, **{**settings, **smaller})))

        monkeypatch.setattr(module, "precompute", small)
        script = tmp_path / "recipe.py"
        script.write_text(RECIPES[heading].replace("/path/to", str(tmp_path)))
        runpy.run_path(str(script))
        (found,) = seen
        return found

    (tmp_path / "data").mkdir()
    return call


def test_the_page_has_six_recipes() -> None:
    assert list(RECIPES) == ["VG-LLM", "SpatialStack", "Spatial-MLLM", "VLM-3R", "3DRS", "A robot policy"]


def settings_of(code: str, function: str) -> dict[str, Any]:
    """The keywords of the one call of a function, those that are given as `**kept` too."""
    kept: dict[str, Any] = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "kept":
            kept = ast.literal_eval(node.value)
    (call,) = (
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function
    )
    return kept | {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}


@pytest.mark.parametrize("heading", RECIPES)
def test_what_a_recipe_keeps_is_what_the_consumers_line_looks_for(heading: str) -> None:
    section = {"A robot policy": "VGGT-DP and other policies"}.get(heading, heading)
    text = (PAGE.parent / "consumers.md").read_text().partition(f"\n## {section}\n")[2]
    (line, *_) = re.findall(r"`([^`]*CachedAggregator\([^`]*)`", text)
    line, recipe = settings_of(line, "CachedAggregator"), settings_of(RECIPES[heading], "precompute")
    layers = recipe.get("layers", recipe.get("layer", -2))
    asked = line.get("layers", -2)
    assert str(layers) == ",".join(map(str, asked if isinstance(asked, tuple) else [asked]))
    assert recipe.get("tokens", "patches") == line.get("tokens", "all")
    assert recipe["context"] == "joint"


@pytest.mark.parametrize(
    ("frames", "taken"), [(3, [0, 1, 2]), (12, [0, 2, 4, 6, 8, 11]), (40, [0, 5, 11, 16, 22, 27, 33, 39])]
)
def test_vgllm_takes_images_as_named_and_of_a_folder_four_to_eight(
    frames: int, taken: list[int], run: Any, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    names = [write_image(data / "clip" / f"{at:03d}.png", at) for at in range(frames)]
    samples = [{"images": ["clip/001.png", "clip/000.png"]}, {"video": "clip"}]
    (data / "train.json").write_text(json.dumps(samples))
    lists, settings, done = run("VG-LLM")
    assert lists == [[names[1], names[0]], [names[at] for at in taken]]
    assert settings == {"encoder": "facebook/VGGT-1B", "context": "joint", "alpha": "drop"}
    assert (done.computed, done.failures) == (2, ())


def test_spatialstack_takes_what_its_dataset_prepares_and_three_layers(run: Any) -> None:
    lists, settings, done = run("SpatialStack")
    assert [len(frames) for frames in lists] == [3]
    assert settings["layers"] == "11,17,23"
    assert done.computed == 1


@pytest.mark.parametrize(
    ("heading", "count", "kept"),
    [
        ("Spatial-MLLM", 16, {"layer": -1}),
        ("VLM-3R", 32, {"layer": -1, "tokens": "patches+camera"}),
    ],
)
def test_videos_are_sampled_evenly_from_the_first_frame_to_the_last(
    heading: str, count: int, kept: dict[str, Any], run: Any, tmp_path: Path
) -> None:
    (tmp_path / "data" / "a.mp4").write_text("100")
    lists, settings, done = run(heading)
    (frames,) = lists
    shades = [round(float(frame.mean()) * 255) for frame in frames]
    assert shades == np.linspace(0, 99, count, dtype=int).tolist()
    assert {name: settings[name] for name in kept} == kept
    assert done.computed == 1


def test_3drs_takes_thirty_two_sorted_images_of_each_scene(run: Any, tmp_path: Path) -> None:
    scene = tmp_path / "data" / "scene"
    scene.mkdir()
    for at in range(34):
        Image.new("RGB", (28, 28), (at, at, at)).save(scene / f"{at:03d}.jpg")
    lists, settings, done = run("3DRS")
    assert [path.name for path in lists[0]] == [f"{at:03d}.jpg" for at in np.linspace(0, 33, 32, dtype=int)]
    assert settings["layer"] == -1
    assert done.computed == 1


def test_a_policy_takes_single_frames_and_all_tokens(run: Any) -> None:
    lists, settings, done = run("A robot policy")
    assert [len(frames) for frames in lists] == [1] * 5
    assert (settings["context"], settings["tokens"], settings["layer"]) == ("joint", "all", -1)
    assert done.computed == 5

"""The demo's own data: a renderer that is right, walks that are possible, three layouts, a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from safetensors import safe_open

from vggt_cache.demo import dataset
from vggt_cache.demo.checkpoint import CONFIG, draw_tensor, tensor_shapes, write_checkpoint
from vggt_cache.demo.dataset import DatasetSummary, write_dataset
from vggt_cache.demo.house import House, Pose, move, walk
from vggt_cache.demo.scene import Scene
from vggt_cache.errors import CheckpointError, DataError, SettingsError

HALF_WIDTH_RATIO = math.tan(math.radians(79 / 2))


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DatasetSummary:
    return write_dataset(tmp_path_factory.mktemp("demo") / "data", episodes=2, steps=12)


# ---------------------------------------------------------------- the renderer


def drawn(scene: Scene, pose: Pose) -> npt.NDArray[np.uint8]:
    return scene.picture(scene.look(pose))


def cast(house: House, pose: Pose, row: int, column: int) -> float:
    """Depth of the first box, floor or ceiling on a pixel's ray, by testing each in turn."""
    angle = math.radians(15 * pose.heading)
    right = (column + 0.5 - 320) / 320 * HALF_WIDTH_RATIO
    up = (239.5 - row) / 320 * HALF_WIDTH_RATIO
    ray = (
        math.cos(angle) + right * math.sin(angle),
        math.sin(angle) - right * math.cos(angle),
        up,
    )
    eye = (pose.x, pose.y, 1.25)
    nearest = (2.6 - 1.25) / up if up > 0 else 1.25 / -up
    for box in house.boxes:
        spans = []
        for start, step, low, high in zip(eye, ray, box.low, box.high, strict=True):
            bounds = [(low - start) / step, (high - start) / step] if step else [-math.inf, math.inf]
            spans.append((min(bounds), max(bounds)))
        enter, leave = max(span[0] for span in spans), min(span[1] for span in spans)
        if 0 < enter < leave:
            nearest = min(nearest, enter)
    return nearest


def test_depth_of_every_pixel_is_that_of_a_ray_cast_against_all_boxes(scene: Scene) -> None:
    pixels = random.Random(1)
    for room in scene.house.rooms[:4]:
        pose = Pose(x=room.centre[0] + 0.31, y=room.centre[1] - 0.17, heading=pixels.randrange(24))
        depth = scene.look(pose).depth
        chosen = [(pixels.randrange(480), pixels.randrange(640)) for _ in range(150)]
        wrong = [
            (row, column)
            for row, column in chosen
            if abs(depth[row, column] - cast(scene.house, pose, row, column)) > 2e-3 * depth[row, column]
        ]
        # A ray that grazes an edge may fall to either side of it.
        assert len(wrong) <= 2, (room.name, pose, wrong)


def test_walking_towards_a_wall_brings_it_nearer_by_the_step(scene: Scene) -> None:
    x, y = scene.house.rooms[0].centre
    before, after = (scene.look(Pose(x=x - 0.5 + d, y=y, heading=0)).depth[100, 320] for d in (0.0, 0.25))
    assert before - after == pytest.approx(0.25, abs=1e-4)


def test_a_full_turn_returns_to_the_same_picture_and_a_turn_does_not(scene: Scene) -> None:
    pose = Pose(x=2.0, y=2.0, heading=3)
    turned = pose
    for _ in range(24):
        turned = move(turned, "TURN_LEFT")
        if turned.heading != pose.heading:
            assert turned.forward != pose.forward
    assert turned == pose
    assert not np.array_equal(drawn(scene, pose), drawn(scene, move(pose, "TURN_LEFT")))


def test_pictures_are_rgb_bytes_of_640_by_480_and_look_indoors(scene: Scene) -> None:
    x, y = scene.house.rooms[2].centre
    picture = drawn(scene, Pose(x=x, y=y, heading=7))
    assert (picture.shape, picture.dtype) == ((480, 640, 3), np.uint8)
    assert 40 < picture.mean() < 220
    assert picture.reshape(-1, 3).std(axis=0).min() > 15
    labels = set(scene.labels[scene.look(Pose(x=x, y=y, heading=7)).face // 6].ravel())
    assert {"wall", "floor", "ceiling"} <= labels


def test_another_process_with_another_hash_seed_draws_the_same_bytes(scene: Scene) -> None:
    code = (
        "import hashlib; from vggt_cache.demo.house import Pose; from vggt_cache.demo.scene import Scene;"
        "scene = Scene(0); picture = scene.picture(scene.look(Pose(x=2.0, y=2.0, heading=1)));"
        "print(hashlib.sha256(picture.tobytes()).hexdigest())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
    )
    assert run.stderr == ""
    here = hashlib.sha256(drawn(scene, Pose(x=2.0, y=2.0, heading=1)).tobytes()).hexdigest()
    assert run.stdout.strip() == here


def test_pictures_are_those_of_this_drawing_version(scene: Scene) -> None:
    digest = hashlib.sha256()
    for heading in (1, 8, 17):
        digest.update(drawn(scene, Pose(x=2.0, y=2.0, heading=heading)).tobytes())
    assert (dataset.DRAWING_VERSION, digest.hexdigest()[:16]) == (2, "8202402adcd3a257"), (
        "the pictures have changed: raise DRAWING_VERSION, so that data written earlier is drawn again"
    )


def test_houses_of_different_seeds_differ() -> None:
    assert len({tuple(room.name for room in House(seed).rooms) for seed in range(6)}) > 3


# ---------------------------------------------------------------- walks


def obstacles_near(house: House, x: float, y: float, distance: float) -> list[str]:
    return [
        box.label
        for box in house.boxes
        if box.high[2] > 0 and box.low[2] < 1.9  # not the floor, and not above the walker's head
        if box.low[0] - distance < x < box.high[0] + distance
        and box.low[1] - distance < y < box.high[1] + distance
    ]


@pytest.mark.parametrize("seed", range(6))
def test_no_walk_comes_nearer_than_20_cm_to_anything_solid(seed: int) -> None:
    house = House(seed)
    for name in ("a", "b"):
        steps = walk(house, name=name, steps=120).steps
        for step, following in pairwise(steps):
            for share in (0.0, 0.25, 0.5, 0.75):
                x = step.pose.x + share * (following.pose.x - step.pose.x)
                y = step.pose.y + share * (following.pose.y - step.pose.y)
                assert not obstacles_near(house, x, y, 0.2), (seed, name, step)


def test_every_room_of_every_house_can_be_reached() -> None:
    for seed in range(20):
        house = House(seed)
        reached, edge = {0}, [0]
        while edge:
            room = edge.pop()
            behind = {r for door in house.doors_of(room) for r in door.rooms} - reached
            reached |= behind
            edge += behind
        assert reached == set(range(len(house.rooms)))


@pytest.mark.parametrize("steps", [2, 24, 60])
def test_a_walk_has_the_asked_length_stops_once_at_the_end_and_obeys_its_actions(steps: int) -> None:
    episode = walk(House(3), name="x", steps=steps)
    assert len(episode.steps) == steps
    assert [step.action for step in episode.steps].index("STOP") == steps - 1
    for step, following in pairwise(episode.steps):
        moved = math.dist((step.pose.x, step.pose.y), (following.pose.x, following.pose.y))
        turned = (following.pose.heading - step.pose.heading) % 24
        expected = {"MOVE_FORWARD": (0.25, 0), "TURN_LEFT": (0.0, 1), "TURN_RIGHT": (0.0, 23)}[step.action]
        assert (pytest.approx(moved, abs=1e-9), turned) == expected


def test_a_walk_of_24_frames_goes_through_a_doorway_and_uses_all_actions() -> None:
    actions: set[str] = set()
    for seed in range(4):
        house = House(seed)
        episode = walk(house, name="y", steps=24)
        assert len({house.room_at(step.pose.x, step.pose.y).index for step in episode.steps}) >= 2
        actions |= {step.action for step in episode.steps}
    assert actions == {"MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT", "STOP"}


def test_instructions_name_the_rooms_and_checkpoints_follow_the_parts() -> None:
    house = House(1)
    episode = walk(house, name="z", steps=60)
    last = episode.steps[-1].pose
    assert house.room_at(last.x, last.y).name in episode.subinstructions[-1]
    assert episode.instruction == " ".join(episode.subinstructions)
    assert [step.part for step in episode.steps] == sorted(step.part for step in episode.steps)
    assert len(episode.checkpoints) == len(episode.subinstructions)
    for part, frame in enumerate(episode.checkpoints[:-1]):
        assert episode.steps[frame].part == part + 1
        assert episode.steps[frame - 1].part == part


# ---------------------------------------------------------------- the three layouts


def conversations(summary: DatasetSummary) -> list[dict]:
    lines = (summary.root / "conversations" / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines] + json.loads(
        (summary.root / "conversations" / "train_list.json").read_text()
    )


def structured(summary: DatasetSummary) -> list[dict]:
    files = sorted((summary.root / "structured").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_all_frames_are_distinct_rgb_images_of_640_by_480(made: DatasetSummary) -> None:
    files = sorted((made.root / "episodes" / "train").rglob("*.png"))
    assert len(files) == made.frames == 24
    pixels = set()
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (640, 480))
            pixels.add(image.tobytes())
    assert len(pixels) == len(files)
    assert sum(file.stat().st_size for file in files) == made.image_bytes


def test_conversations_have_one_image_mark_a_frame_and_every_step_once(made: DatasetSummary) -> None:
    samples = conversations(made)
    assert len(samples) == len({sample["id"] for sample in samples}) == made.frames
    for sample in samples:
        human, answer = sample["conversations"]
        assert human["value"].count("<image>") == len(sample["images"]) <= 9
        assert sample["images"][-1] == sample["id"]
        assert sample["id"].endswith(f"_{answer['value'].lower()}.png")
        assert all((made.root / "conversations" / name).is_file() for name in sample["images"])


def test_structured_samples_see_the_same_frames_as_conversations(made: DatasetSummary) -> None:
    def digests(folder: Path, names: list[str]) -> list[str]:
        return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names]

    seen = {tuple(digests(made.root / "conversations", sample["images"])) for sample in conversations(made)}
    for sample in structured(made):
        names = [*sample["history_images"], sample["current_image"]]
        assert tuple(digests(made.root / "structured", names)) in seen
        assert all(
            sample[key] for key in ("instruction", "subinstruction", "2D_description", "3D_description")
        )
        assert sample["subinstruction"] in sample["instruction"]
    assert len(structured(made)) == made.frames == len(seen)


def test_episode_folders_hold_a_picture_and_words_for_each_step(made: DatasetSummary) -> None:
    for folder in sorted((made.root / "episodes" / "train").iterdir()):
        milestones = json.loads((folder / "milestones_result.json").read_text())
        frames = sorted(folder.glob("*.png"))
        assert [int(frame.name[5:9]) for frame in frames] == list(range(12))
        assert frames[-1].name.endswith("_STOP.png")
        for frame in frames:
            words = json.loads(frame.with_suffix(".json").read_text())
            assert set(words) == {"landmark_description", "spatial_description"}
        indices = [entry["checkpoint_frame_index"] for entry in milestones["completion_checkpoints"]]
        assert len(indices) == len(milestones["subinstructions"])
        assert indices == sorted(indices)
        assert indices[-1] == 11


def test_each_layout_is_complete_when_copied_away(made: DatasetSummary, tmp_path: Path) -> None:
    for folder in (made.root / "conversations", made.root / "structured"):
        shutil.copytree(folder, tmp_path / folder.name)
    moved = tmp_path / "conversations"
    for line in (moved / "train.jsonl").read_text().splitlines():
        assert all((moved / name).is_file() for name in json.loads(line)["images"])
    for sample in structured(made):
        assert (tmp_path / "structured" / sample["current_image"]).is_file()
    assert not list(tmp_path.rglob(".*"))


def state(root: Path) -> dict[str, tuple[int, int, str]]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {
        str(path.relative_to(root)): (
            path.stat().st_mtime_ns,
            path.stat().st_ino,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in files
    }


def test_a_second_call_changes_no_file(made: DatasetSummary) -> None:
    before = state(made.root)
    again = write_dataset(made.root, episodes=2, steps=12)
    assert state(made.root) == before
    assert again.written == 0
    assert again.image_bytes == made.image_bytes


def contents(root: Path) -> dict[str, str]:
    return {name: digest for name, (_, _, digest) in state(root).items()}


def test_damaged_and_missing_files_are_made_again(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "d", episodes=1, steps=3)
    before = contents(first.root)
    victim = next((first.root / "conversations").rglob("*.png"))
    victim.write_bytes(b"damaged")  # through a hard link this damages the other layouts as well
    (first.root / "structured" / "episode_1.jsonl").unlink()
    second = write_dataset(tmp_path / "d", episodes=1, steps=3)
    assert contents(first.root) == before
    assert second.written > 0


def test_fewer_episodes_leave_nothing_of_the_former_ones_but_foreign_files_stay(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", episodes=3, steps=2)
    (tmp_path / "d" / "conversations" / "notes.txt").write_text("mine")
    write_dataset(tmp_path / "d", episodes=1, steps=2)
    write_dataset(tmp_path / "fresh", episodes=1, steps=2)
    left = contents(tmp_path / "d")
    assert left.pop("conversations/notes.txt")
    assert left == contents(tmp_path / "fresh")
    assert not (tmp_path / "d" / "conversations" / "3").exists()


def test_an_interrupted_run_is_completed_by_the_next_whatever_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> Iterator[dict]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "_json_lines", stop)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(tmp_path / "d", episodes=1, steps=3)
    assert (tmp_path / "d" / "structured").is_dir()
    write_dataset(tmp_path / "d", episodes=1, steps=2)
    write_dataset(tmp_path / "fresh", episodes=1, steps=2)
    assert contents(tmp_path / "d") == contents(tmp_path / "fresh")


def test_a_directory_with_other_files_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(DataError, match="not empty and holds no demo data"):
        write_dataset(tmp_path, episodes=1, steps=2)
    assert contents(tmp_path).keys() == {"thesis.tex"}


def test_a_list_of_files_cannot_make_it_delete_outside_its_folder(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", episodes=1, steps=2)
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    digest = hashlib.sha256(b"mine").hexdigest()
    sums = tmp_path / "d" / "SHA256SUMS"
    lines = "".join(f"{digest}  {name}\n" for name in ("../outside.txt", str(outside)))
    sums.write_text(sums.read_text().replace("# complete", f"{lines}# other"))
    write_dataset(tmp_path / "d", episodes=1, steps=2)
    assert outside.read_text() == "mine"


def test_counts_out_of_range_and_unwritable_places_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="episodes is 0, outside 1 to 999"):
        write_dataset(tmp_path, episodes=0)
    with pytest.raises(SettingsError, match="steps is 1, outside 2 to 9999"):
        write_dataset(tmp_path, steps=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        write_dataset(tmp_path / "file" / "d", episodes=1, steps=2)


def test_a_file_system_without_hard_links_gets_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    linked = contents(write_dataset(tmp_path / "linked", episodes=1, steps=2).root)
    monkeypatch.setattr(os, "link", refuse)
    assert contents(write_dataset(tmp_path / "copied", episodes=1, steps=2).root) == linked


# ---------------------------------------------------------------- the checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("checkpoint")
    before = os.umask(0o027)
    try:
        yield write_checkpoint(folder / "vggt")
    finally:
        os.umask(before)
        shutil.rmtree(folder)


def test_checkpoint_has_exactly_the_encoders_names_and_shapes_and_a_head(checkpoint: Path) -> None:
    torch = pytest.importorskip("torch")
    from vggt_cache.encoder import Encoder, EncoderConfig

    with torch.device("meta"):
        encoder = Encoder(
            EncoderConfig.from_dict(json.loads((checkpoint / "config.json").read_text())), layer=-1
        )
    expected = {f"aggregator.{name}": list(value.shape) for name, value in encoder.state_dict().items()}
    with safe_open(checkpoint / "model.safetensors", "np") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in found} == {"F32"}
    expected["aggregator.patch_embed.mask_token"] = [1, 384]  # in every checkpoint, used by none
    heads = {name for name in found if not name.startswith("aggregator.")}
    assert heads
    assert {name: shape for name, shape in found.items() if name not in heads} == expected
    assert found == {name: list(shape) for name, shape in tensor_shapes().items()}


def test_checkpoint_files_have_the_umasks_mode(checkpoint: Path) -> None:
    assert {path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()} == {
        "config.json": 0o640,
        "model.safetensors": 0o640,
    }


def test_a_second_call_leaves_the_checkpoint_and_a_torn_one_is_replaced(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    before, stat = weights.read_bytes(), weights.stat()
    write_checkpoint(checkpoint)
    assert (weights.stat().st_mtime_ns, weights.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)
    for size in (len(before) - 4, 1000, 0):
        os.truncate(weights, size)
        write_checkpoint(checkpoint)
        assert weights.read_bytes() == before


def test_a_tensor_depends_on_its_name_its_shape_and_the_seed_alone() -> None:
    name, shape = "aggregator.global_blocks.2.attn.qkv.weight", (1152, 384)
    value = draw_tensor(name, shape, 0)
    assert np.array_equal(value, draw_tensor(name, shape, 0))
    assert not np.array_equal(value, draw_tensor(name, shape, 1))
    assert not np.array_equal(value, draw_tensor(name.replace("2", "3"), shape, 0))
    assert value.dtype == np.float32
    assert value.std() == pytest.approx(384**-0.5, rel=0.01)


def test_every_kind_of_tensor_has_a_scale() -> None:
    for name, shape in tensor_shapes().items():
        values = draw_tensor(name, shape, 0)
        assert values.shape == shape
        assert np.isfinite(values).all()
        assert values.std() > 0
    assert CONFIG["patch_embed"] == "dinov2_vits14_reg"


def test_an_unwritable_checkpoint_directory_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="checkpoint cannot be written to"):
        write_checkpoint(tmp_path / "file")

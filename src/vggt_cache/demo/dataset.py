"""Writes the demo's walks in the three layouts that users bring, over the same frames.

    conversations/   <episode>/0000_turn_left.png ..., train.jsonl, train_list.json   JanusVLN conversations
    structured/      <episode>/0000.png ..., episode_<episode>.jsonl                  samples with descriptions
    episodes/train/  <episode>/step_0000_TURN_LEFT.png, .json, milestones_result.json
    SHA256SUMS                                                                        of all these files

Each folder is complete by itself. The three names of an image are hard links to one file, where the file
system has them, so that all layouts together take the disk space of one.
"""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vggt_cache.demo.folder import GeneratedFolder
from vggt_cache.demo.scene import Scene, View
from vggt_cache.demo.walk import ACTIONS, Episode, Step, walk
from vggt_cache.errors import DataError, SettingsError
from vggt_cache.samples import history_indexes

DRAWING_VERSION = 2
"""Raised whenever the same arguments give other files."""
_PNG_LEVEL = 3
_EPISODES_A_HOUSE = 2


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What `write_dataset` left under its root."""

    root: Path
    episodes: int
    frames: int
    """Distinct images, and samples in each of the three layouts: one a frame."""
    image_bytes: int
    """Bytes of the distinct images."""
    written: int
    """Files that were written; 0 if everything was there already."""


def write_dataset(
    root: str | os.PathLike[str], *, episodes: int = 4, steps: int = 24, seed: int = 0
) -> DatasetSummary:
    """Write `episodes` walks of `steps` frames each under `root`; if all is there already, nothing is touched.

    Raises SettingsError for counts out of range, DataError if `root` holds something else or cannot be written.
    """
    for name, value, least, most in (("episodes", episodes, 1, 999), ("steps", steps, 2, 9999)):
        if not least <= value <= most:
            raise SettingsError(
                f"{name} is {value}, outside {least} to {most}: choose a number in this range"
            )
    folder = GeneratedFolder(Path(root), f"{DRAWING_VERSION}: episodes={episodes} steps={steps} seed={seed}")
    try:
        if not folder.is_complete():
            folder.begin()
            _write(folder, episodes, steps, seed)
            folder.end()
        image_bytes = sum(path.stat().st_size for path in (Path(root) / "episodes").rglob("*.png"))
    except OSError as error:
        raise DataError(
            f"the demo's data cannot be written to {root} ({error.strerror or error}): "
            "choose a directory that you can write to, with enough free space"
        ) from error
    return DatasetSummary(
        root=Path(root),
        episodes=episodes,
        frames=episodes * steps,
        image_bytes=image_bytes,
        written=len(folder.digests),
    )


def _write(folder: GeneratedFolder, episodes: int, steps: int, seed: int) -> None:
    # JanusVLN's own tool writes one large list; others use JSON Lines. The demo has some of each.
    lines: list[dict[str, Any]] = []
    listed: list[dict[str, Any]] = []
    for number in range(episodes):
        if number % _EPISODES_A_HOUSE == 0:
            scene = Scene(seed * 1000 + number // _EPISODES_A_HOUSE)
        episode = walk(scene.house, name=f"episode/{number}", steps=steps)
        (listed if number % 2 else lines).extend(_write_episode(folder, str(number + 1), episode, scene))
    folder.put("conversations/train.jsonl", _json_lines(lines))
    if listed:
        folder.put("conversations/train_list.json", _json(listed))


def _write_episode(
    folder: GeneratedFolder, name: str, episode: Episode, scene: Scene
) -> list[dict[str, Any]]:
    """Draws the frames and writes the episode in all layouts; returns its conversations."""
    steps, home = episode.steps, f"episodes/train/{name}"
    numbered = [f"{name}/{i:04d}.png" for i in range(len(steps))]
    named = [f"{name}/{i:04d}_{step.action.lower()}.png" for i, step in enumerate(steps)]
    structured, conversations = [], []
    for i, step in enumerate(steps):
        view, png = scene.look(step.pose), io.BytesIO()
        Image.fromarray(scene.picture(view)).save(png, "PNG", compress_level=_PNG_LEVEL)
        stem = f"{home}/step_{i:04d}_{step.action}"
        folder.put(f"{stem}.png", png.getvalue())
        for name_there in (f"structured/{numbered[i]}", f"conversations/{named[i]}"):
            folder.put(name_there, png.getvalue(), same_as=f"{stem}.png")
        landmarks, distances = _words(scene, step, view)
        folder.put(
            f"{stem}.json", _json({"landmark_description": landmarks, "spatial_description": distances})
        )
        seen = history_indexes(i)
        structured.append(
            {
                "id": f"{name}_{i:04d}",
                "history_images": [numbered[j] for j in seen[:-1]],
                "current_image": numbered[i],
                "instruction": episode.instruction,
                "subinstruction": episode.subinstructions[step.part],
                "2D_description": landmarks,
                "3D_description": distances,
                "action": step.action,
            }
        )
        talk = [("human", _question(episode.instruction, len(seen) - 1)), ("gpt", step.action)]
        talked = [{"from": who, "value": said} for who, said in talk]
        conversations.append({"id": named[i], "conversations": talked, "images": [named[j] for j in seen]})
    folder.put(f"structured/episode_{name}.jsonl", _json_lines(structured))
    milestones = {
        "episode_id": name,
        "instruction_text": episode.instruction,
        "subinstructions": list(episode.subinstructions),
        "completion_checkpoints": [{"checkpoint_frame_index": index} for index in episode.checkpoints],
    }
    folder.put(f"{home}/milestones_result.json", _json(milestones))
    return conversations


def _words(scene: Scene, step: Step, view: View) -> tuple[str, str]:
    """What the frame shows (2D) and how far away that is (3D)."""
    room = scene.house.room_at(step.pose.x, step.pose.y)
    labels = scene.labels[view.face // 6]
    nearest_m = {thing: view.depth[labels == thing] for thing in ("doorway", "window") if thing in labels}
    things = "".join(f", a {thing}" for thing in nearest_m)
    distances = "".join(
        f", the nearest {thing} {depths_m.min():.1f} m away" for thing, depths_m in nearest_m.items()
    )
    ahead_m = view.depth[220:260, 300:340].min()
    return (
        f"The {room.name} with {room.wall} and a floor of {room.floor}{things}.",
        f"At eye level the view ahead is free for {ahead_m:.1f} m{distances}.",
    )


def _question(instruction: str, earlier: int) -> str:
    """The prompt of a conversation, with one `<image>` for each frame."""
    memory = f"On your way so far you saw {'<image>' * earlier}. " if earlier else ""
    return (
        f"You walk through a house and follow an instruction. {memory}Now you see <image>. "
        f"The instruction: {instruction} Answer with the next action, one of {' '.join(ACTIONS[1:])} {ACTIONS[0]}."
    )


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _json_lines(samples: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(sample) + "\n" for sample in samples).encode()

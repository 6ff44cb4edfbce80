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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from vggt_cache.demo.describe import Words, describe
from vggt_cache.demo.folder import GeneratedFolder
from vggt_cache.demo.scene import Scene
from vggt_cache.demo.walk import ACTIONS, Episode, walk
from vggt_cache.errors import DataError, SettingsError
from vggt_cache.samples import history_indexes

DRAWING_VERSION = 1
"""Raised whenever the same arguments give other files."""
_PNG_LEVEL = 3
_EPISODES_A_HOUSE = 2


@dataclass(frozen=True, kw_only=True)
class DatasetSummary:
    """What `write_dataset` left under its root."""

    root: Path
    conversations: Path
    structured: Path
    episode_folders: Path
    """`episodes/train`, one folder an episode."""
    episodes: int
    frames: int
    """Distinct images."""
    samples: int
    """Samples in each of the three layouts: one a frame."""
    image_bytes: int
    """Bytes of the distinct images."""
    written: int
    """Files that were new or changed; 0 if everything was there already."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    """One episode, rendered."""

    name: str
    episode: Episode
    pictures: list[bytes]
    words: list[Words]


def write_dataset(
    root: str | os.PathLike[str], *, episodes: int = 4, steps: int = 24, seed: int = 0
) -> DatasetSummary:
    """Write `episodes` walks of `steps` frames each under `root`; equal files that are there are left untouched.

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
            with folder:
                _write(folder, episodes, steps, seed)
    except OSError as error:
        raise DataError(
            f"the demo's data cannot be written to {root} ({error.strerror or error}): "
            "choose a directory that you can write to, with enough free space"
        ) from error
    return _summary(folder, episodes, episodes * steps)


def _summary(folder: GeneratedFolder, episodes: int, frames: int) -> DatasetSummary:
    root = folder.root
    images = [
        size for name, size in folder.sizes.items() if name.startswith("episodes/") and name.endswith(".png")
    ]
    return DatasetSummary(
        root=root,
        conversations=root / "conversations",
        structured=root / "structured",
        episode_folders=root / "episodes" / "train",
        episodes=episodes,
        frames=frames,
        samples=frames,
        image_bytes=sum(images),
        written=folder.written,
    )


def _write(folder: GeneratedFolder, episodes: int, steps: int, seed: int) -> None:
    conversations: list[list[dict[str, Any]]] = []
    for told in _tell(episodes, steps, seed):
        _write_episode_folder(folder, told)
        _write_structured(folder, told)
        conversations.append(_write_conversations(folder, told))
    # JanusVLN's own tool writes one large list; others use JSON Lines. The demo has some of each.
    lines = [sample for number, samples in enumerate(conversations) if number % 2 == 0 for sample in samples]
    listed = [sample for number, samples in enumerate(conversations) if number % 2 == 1 for sample in samples]
    folder.put("conversations/train.jsonl", _json_lines(lines))
    if listed:
        folder.put("conversations/train_list.json", (json.dumps(listed, indent=1) + "\n").encode())


def _tell(episodes: int, steps: int, seed: int) -> Iterator[_Told]:
    """All episodes, rendered one after the other; some share a house."""
    for number in range(episodes):
        if number % _EPISODES_A_HOUSE == 0:
            scene = Scene(seed * 1000 + number // _EPISODES_A_HOUSE)
        episode = walk(scene.house, name=f"episode/{number}", steps=steps)
        views = (scene.look(step.pose) for step in episode.steps)
        drawn = [(_png(scene.picture(view)), describe(scene.faces, view)) for view in views]
        yield _Told(
            name=str(number + 1),
            episode=episode,
            pictures=[picture for picture, _ in drawn],
            words=[words for _, words in drawn],
        )


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()


def _json_lines(samples: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(sample) + "\n" for sample in samples).encode()


# ---------------------------------------------------------------- the three layouts


def _write_episode_folder(folder: GeneratedFolder, told: _Told) -> None:
    home = f"episodes/train/{told.name}"
    for index in range(len(told.pictures)):
        stem = _stem(told, index)
        folder.put(f"{stem}.png", told.pictures[index])
        words = {
            "landmark_description": told.words[index].landmarks,
            "spatial_description": told.words[index].distances,
        }
        folder.put(f"{stem}.json", (json.dumps(words, indent=1) + "\n").encode())
    milestones = {
        "episode_id": told.name,
        "instruction_text": told.episode.instruction,
        "subinstructions": list(told.episode.subinstructions),
        "completion_checkpoints": [{"checkpoint_frame_index": index} for index in told.episode.checkpoints],
    }
    folder.put(f"{home}/milestones_result.json", (json.dumps(milestones, indent=1) + "\n").encode())


def _stem(told: _Told, index: int) -> str:
    return f"episodes/train/{told.name}/step_{index:04d}_{told.episode.steps[index].action}"


def _write_structured(folder: GeneratedFolder, told: _Told) -> None:
    samples = []
    names = [f"{told.name}/{index:04d}.png" for index in range(len(told.pictures))]
    for index, step in enumerate(told.episode.steps):
        folder.put_link(f"structured/{names[index]}", f"{_stem(told, index)}.png")
        history = [names[i] for i in history_indexes(index)[:-1]]
        samples.append(
            {
                "id": f"{told.name}_{index:04d}",
                "history_images": history,
                "current_image": names[index],
                "instruction": told.episode.instruction,
                "subinstruction": told.episode.subinstructions[step.part],
                "2D_description": told.words[index].landmarks,
                "3D_description": told.words[index].distances,
                "action": step.action,
            }
        )
    folder.put(f"structured/episode_{told.name}.jsonl", _json_lines(samples))


def _write_conversations(folder: GeneratedFolder, told: _Told) -> list[dict[str, Any]]:
    samples = []
    steps = told.episode.steps
    names = [f"{told.name}/{index:04d}_{step.action.lower()}.png" for index, step in enumerate(steps)]
    for index, step in enumerate(steps):
        folder.put_link(f"conversations/{names[index]}", f"{_stem(told, index)}.png")
        images = [names[i] for i in history_indexes(index)]
        talk = [
            {"from": "human", "value": _question(told.episode.instruction, len(images) - 1)},
            {"from": "gpt", "value": step.action},
        ]
        samples.append({"id": names[index], "conversations": talk, "images": images})
    return samples


def _question(instruction: str, earlier: int) -> str:
    """The prompt of a conversation, with one `<image>` for each frame."""
    memory = f"On your way so far you saw {'<image>' * earlier}. " if earlier else ""
    return (
        f"You walk through a house and follow an instruction. {memory}Now you see <image>. "
        f"The instruction: {instruction} Answer with the next action, one of {' '.join(ACTIONS[1:])} {ACTIONS[0]}."
    )

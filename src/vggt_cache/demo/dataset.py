"""Writes the demo's walks in the three layouts that users bring, over the same frames.

    conversations/   <episode>/0000_turn_left.png ..., train.jsonl, train_list.json   JanusVLN conversations
    structured/      <episode>/0000.png ..., episode_<episode>.jsonl                  samples with descriptions
    episodes/train/  <episode>/step_0000_TURN_LEFT.png, .json, milestones_result.json
    SHA256SUMS                                                                        of all these files

Each layout is complete by itself. The three names of an image are hard links to one file, where the file
system has them, so that all layouts together take the disk space of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from PIL import Image

from vggt_cache.demo.house import ACTIONS, Episode, Step, walk
from vggt_cache.demo.scene import Scene, View
from vggt_cache.errors import DataError, SettingsError, os_errors_as
from vggt_cache.samples import history_indexes

DRAWING_VERSION = 2
"""Raised whenever the same arguments give other files."""
_PNG_LEVEL = 3
_EPISODES_A_HOUSE = 2
_MARK, _END = "# vggt-cache demo data", "# complete"


class DatasetSummary(NamedTuple):
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
    for name, value, low, high in (("episodes", episodes, 1, 999), ("steps", steps, 2, 9999)):
        if not low <= value <= high:
            raise SettingsError(f"{name} is {value}, outside {low} to {high}: choose a number in this range")
    folder = _Folder(Path(root), f"{DRAWING_VERSION}: episodes={episodes} steps={steps} seed={seed}")
    remedy = ": choose a directory that you can write to, with enough free space"
    with os_errors_as(DataError, f"the demo's data cannot be written to {root}", remedy):
        if not folder.is_complete():
            folder.begin()
            _write(folder, episodes, steps, seed)
            folder.note(_END)
        size = sum(path.stat().st_size for path in (Path(root) / "episodes").rglob("*.png"))
    frames = episodes * steps
    return DatasetSummary(Path(root), episodes, frames, image_bytes=size, written=folder.written)


class _Folder:
    """Files under `root` that `description` determines; `sha256sum -c SHA256SUMS` checks them.

    Each is listed before it is written, so that those of an interrupted or older run are known and can be removed.
    """

    def __init__(self, root: Path, description: str) -> None:
        self.written = 0
        self._root, self._sums = root, root / "SHA256SUMS"
        self._header = f"{_MARK} {description}"

    def is_complete(self) -> bool:
        """Whether an earlier run with the same description left every file, and all are intact."""
        lines = self._lines() or [""]
        if lines[0] != self._header or lines[-1] != _END:
            return False
        try:
            return all(_digest((self._root / name).read_bytes()) == digest for digest, name in _listed(lines))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return False

    def begin(self) -> None:
        """Remove what an earlier run left. Raises DataError where the folder holds something else."""
        lines = self._lines()
        if lines is None and self._root.is_dir() and any(self._root.iterdir()):
            raise DataError(
                f"{self._root} is not empty and holds no demo data, so writing there could mix with your own files: "
                "choose a new or empty directory"
            )
        for _, name in _listed(lines or []):
            (self._root / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for parent in PurePosixPath(name).parents[:-1]:
                    (self._root / parent).rmdir()
        self._root.mkdir(parents=True, exist_ok=True)
        self._sums.write_text(f"{self._header}\n")

    def put(self, name: str, data: bytes, *, same_as: str = "") -> None:
        """Write a file, or link it to one that has the same bytes, where the file system has hard links."""
        self.note(f"{_digest(data)}  {name}")
        self.written += 1
        (self._root / name).parent.mkdir(parents=True, exist_ok=True)
        if same_as:
            with contextlib.suppress(OSError):
                os.link(self._root / same_as, self._root / name)
                return
        (self._root / name).write_bytes(data)

    def note(self, line: str) -> None:
        with open(self._sums, "a", encoding="utf-8") as sums:
            sums.write(f"{line}\n")

    def _lines(self) -> list[str] | None:
        """The lines of SHA256SUMS; None if there is none of ours."""
        try:
            text = self._sums.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        return text.splitlines() if text.startswith(_MARK) else None


def _listed(lines: list[str]) -> list[tuple[str, str]]:
    """Digests and names of files; names that lead out of the folder are left out."""
    pairs = [(digest, name) for digest, blanks, name in (line.partition("  ") for line in lines) if blanks]
    return [pair for pair in pairs if not {"/", ".."} & set(PurePosixPath(pair[1]).parts)]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(folder: _Folder, episodes: int, steps: int, seed: int) -> None:
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


def _write_episode(folder: _Folder, name: str, episode: Episode, scene: Scene) -> list[dict[str, Any]]:
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
        *earlier, _ = seen = history_indexes(i)
        structured.append(
            {
                "id": f"{name}_{i:04d}",
                "history_images": [numbered[j] for j in earlier],
                "current_image": numbered[i],
                "instruction": episode.instruction,
                "subinstruction": episode.subinstructions[step.part],
                "2D_description": landmarks,
                "3D_description": distances,
                "action": step.action,
            }
        )
        talk = [("human", _question(episode.instruction, len(earlier))), ("gpt", step.action)]
        talked = [{"from": who, "value": said} for who, said in talk]
        conversations.append({"id": named[i], "conversations": talked, "images": [named[j] for j in seen]})
    folder.put(f"structured/episode_{name}.jsonl", _json_lines(structured))
    milestones = {
        "episode_id": name,
        "instruction_text": episode.instruction,
        "subinstructions": episode.subinstructions,
        "completion_checkpoints": [{"checkpoint_frame_index": index} for index in episode.checkpoints],
    }
    folder.put(f"{home}/milestones_result.json", _json(milestones))
    return conversations


def _words(scene: Scene, step: Step, view: View) -> tuple[str, str]:
    """What the frame shows (2D) and how far away that is (3D)."""
    room = scene.house.room_at(step.pose.x, step.pose.y)
    labels = scene.labels[view.face // 6]
    depths_m = {thing: view.depth[labels == thing] for thing in ("doorway", "window")}
    nearest_m = {thing: those.min() for thing, those in depths_m.items() if those.size}
    things = "".join(f", a {thing}" for thing in nearest_m)
    distances = "".join(f", the nearest {thing} {m:.1f} m away" for thing, m in nearest_m.items())
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

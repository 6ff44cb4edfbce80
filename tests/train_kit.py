"""Feature requests, caches and encoders for the tests of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from janusvln.data.images import FeatureRequest
from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.features.computed import LiveEncoder
from janusvln.features.source import FeatureSource
from small_data import history, write_episode, write_image
from vggt_cache.delivery import ReadAhead
from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.frames import decode_frame
from vggt_cache.identity import FeatureSpec, Preprocessing, feature_key, frame_digest
from vggt_cache.precompute.digests import read_in_state
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import FeatureCache

CPU = torch.device("cpu")


def small_spec(checkpoint: Path, context: str, *, feature_dtype: str = "float32") -> FeatureSpec:
    """64x48 images become a grid of 3 x 4 patches."""
    return FeatureSpec(
        encoder=Checkpoint.open(str(checkpoint)).spec("float32"),
        preprocessing=Preprocessing(image_size=56),
        context=context,
        feature_dtype=feature_dtype,
    )


def make_request(spec: FeatureSpec, paths: Sequence[Path], *, index: int = 0) -> FeatureRequest:
    """What a DataLoader worker sends for a sample with these images."""
    used = list(paths)[-1:] if spec.context == "frame" else list(paths)
    data, states = zip(*(read_in_state(str(path)) for path in paths), strict=True)
    digests = tuple(frame_digest(one) for one in data[-len(used) :])
    return FeatureRequest(
        index=index,
        key=feature_key(spec, digests),
        paths=tuple(map(str, used)),
        digests=digests,
        state_hashes=states[-len(used) :],
        frames=torch.stack([torch.from_numpy(decode_frame(one, spec.preprocessing)) for one in data]),
    )


def write_images(root: Path, count: int) -> list[Path]:
    return [write_image(root / f"{number}.png", number) for number in range(count)]


def make_source(
    spec: FeatureSpec, cache: FeatureCache | None, checkpoint: Path | str | None, **options: object
) -> FeatureSource:
    return FeatureSource(
        reader=None if cache is None else ReadAhead(cache, CPU),
        encoder=LiveEncoder(None if checkpoint is None else str(checkpoint), spec, CPU),
        **options,  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------- whole runs

PROMPT = (
    "You are a visual language navigation model.\n This is your historical observation:{history}\n This is your "
    "current observation:<image>\n Your task is to {task}\n You should take one of the following actions:\n "
    "MOVE_FORWARD\n TURN_LEFT\n TURN_RIGHT\n STOP."
)
ACTIONS = ("MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT", "STOP")
SMALL_IMAGES = ["--min_pixels", "784", "--max_pixels", "100000"]


def write_conversations(root: Path, *, episodes: int = 2, steps: int = 16) -> Path:
    """A data root in JanusVLN's layout, prompts and all: episodes x steps samples of 1 to 9 frames."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "train.jsonl", "w") as file:
        for episode in range(episodes):
            names = write_episode(root, f"ep{episode}", steps, seed=episode)
            for step in range(steps):
                frames = [names[at] for at in history(step)]
                prompt = PROMPT.format(history="<image>" * (len(frames) - 1), task=f"walk to room {episode}")
                turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": ACTIONS[step % 4]}]
                file.write(
                    json.dumps({"id": f"{episode}/{step}", "conversations": turns, "images": frames}) + "\n"
                )
    return root


@dataclass(frozen=True)
class Kit:
    """Everything that a training run needs, on disk."""

    data: Path
    qwen: Path
    vggt: Path
    cache: Path
    """Holds all features of `data`, both contexts, float32."""

    def flags(
        self, output_dir: Path, *more: object, context: str = "frame", cached: bool = True
    ) -> list[str]:
        """Of a run that logs every step: from the cache, where a miss is an error, or live."""
        flags: list[object] = [
            "--model_name_or_path", self.qwen, "--train_data_root", self.data, "--output_dir", output_dir,
            "--context", context, "--use_cpu", "True", "--tune_mm_llm", "True", "--tune_mm_mlp", "True",
            "--tune_mm_vision", "True", "--learning_rate", "1e-3", "--lr_scheduler_type", "constant",
            "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "True",
            *SMALL_IMAGES,
        ]  # fmt: skip
        if cached:
            # A path that does not exist: what is covered never looks at it.
            flags += [
                "--vggt_cache_dir",
                self.cache,
                "--vggt_cache_miss",
                "error",
                "--vggt_model_path",
                "/no/vggt",
            ]
        else:
            flags += ["--vggt_model_path", self.vggt, "--image_size", "56", "--feature_dtype", "float32"]
        return [str(flag) for flag in [*flags, *more]]


def write_kit(root: Path, vggt: Path) -> Kit:
    kit = Kit(
        data=write_conversations(root / "data"),
        qwen=write_tiny_qwen(root / "qwen"),
        vggt=vggt,
        cache=root / "cache",
    )
    for context in ("frame", "causal"):
        settings = PrecomputeSettings(
            vggt_model_path=str(vggt), data_root=str(kit.data), cache_dir=str(kit.cache), context=context,
            image_size=56, feature_dtype="float32", num_workers=0, device="cpu",
        )  # fmt: skip
        assert precompute(settings) == 0
    return kit


def logged(output_dir: Path) -> list[dict[str, Any]]:
    """What a finished run logged in each step, at full precision."""
    state = json.loads((output_dir / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


def largest_difference(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> float:
    """Between losses and gradient norms of two runs, relative, over all steps."""
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]
    pairs = [(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in ("loss", "grad_norm")]
    return max(abs(a - b) / abs(a) for a, b in pairs)

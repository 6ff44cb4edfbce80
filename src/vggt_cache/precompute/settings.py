"""What the user asked for, checked before anything is read; and what Qwen2.5-VL, trained later, asks of a grid."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggt_cache.codec import CODECS, NONE, codec_for, shard_codec
from vggt_cache.context import CONTEXTS
from vggt_cache.environment import rank_of
from vggt_cache.errors import SettingsError, SmallFileError
from vggt_cache.flags import check_choices, flag
from vggt_cache.identity import (
    ALPHA_MODES,
    COMPUTE_DTYPES,
    FEATURE_DTYPES,
    PATCH_SIZE,
    RESIZE_MODES,
    TOKENS,
    Preprocessing,
    check_pool,
    parse_layers,
    parse_pool,
)
from vggt_cache.place import absolute, is_url
from vggt_cache.small_files import read_text
from vggt_cache.store.bucket import require_obstore

MIN_PIXELS, MAX_PIXELS = 16 * 28 * 28, 576 * 28 * 28
"""Of an image given to Qwen: training's defaults, which go before the model's own limits."""


@dataclass(frozen=True, kw_only=True)
class PrecomputeSettings:
    """The flags of `precompute`, under their own names."""

    vggt_model_path: str = flag(
        help="VGGT checkpoint: a directory, or a hub id such as facebook/VGGT-1B", required=False
    )
    data_root: str | None = flag(None, help="folder with annotations (*.jsonl, *.json) or episode folders")
    annotation_path: str | None = flag(
        None, help="annotation files, separated by commas, in place of a data root"
    )
    data_path: str | None = flag(
        None, help="folder that relative image names start from; with --annotation_path"
    )
    cache_dir: str = flag(help="where the features are kept: a directory, or a URL (s3://, gs://, az://)")
    model_path: str | None = flag(
        None, help="Qwen2.5-VL directory; whether training will take the frames' grids is checked"
    )
    min_pixels: int = flag(
        MIN_PIXELS, help="of an image given to Qwen, as training has it; with --model_path"
    )
    max_pixels: int = flag(
        MAX_PIXELS, help="of an image given to Qwen, as training has it; with --model_path"
    )
    context: str = flag(
        next(iter(CONTEXTS)),
        help="; ".join(f"{name}: {rule.seen}" for name, rule in CONTEXTS.items()),
        choices=CONTEXTS,
    )
    image_size: int = flag(518, help="width in pixels, a multiple of 14; JanusVLN uses 644")
    resize_mode: str = flag("crop", help="VGGT's two ways to treat the height", choices=RESIZE_MODES)
    alpha: str = flag("white", help="RGBA images: blend over white, or drop alpha", choices=ALPHA_MODES)
    layer: int = flag(-2, help="which pair's output is stored; negative counts from the end")
    layers: str | None = flag(
        None, help="the same for several, side by side in a feature, such as 11,17,-1", metavar="N,N"
    )
    tokens: str = flag(
        TOKENS[0], help="which tokens of each frame are stored; special: camera and registers", choices=TOKENS
    )
    pool: str | None = flag(
        None, help="average the patches to so many rows and columns, such as 8x8", metavar="HxW"
    )
    feature_dtype: str = flag(
        "bfloat16", help="dtype on disk; int8: quantised from bfloat16", choices=FEATURE_DTYPES
    )
    codec: str = flag(
        NONE, help="lossless: new shards packed, a third smaller, the same bits", choices=CODECS
    )
    compute_dtype: str = flag(
        "auto", help="auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", *COMPUTE_DTYPES)
    )
    device: str = flag("auto", help="cpu, cuda or cuda:N; auto takes a GPU where there is one")
    batch_size: int = flag(8, help="frames encoded together; halved when memory runs out")
    num_workers: int = flag(4, help="processes that decode images; 0: in this one")
    engine: str = flag(
        "claims",
        help="claims: this process and others like it share the work; ray: processes of a Ray cluster do it",
        choices=("claims", "ray"),
    )
    ray_address: str | None = flag(
        None, help="of the cluster (auto: the one of this machine); else RAY_ADDRESS, else a Ray of its own"
    )
    ray_actors: int | None = flag(
        None, kind=int, help="processes that compute; else one for each GPU, or one for each machine without"
    )
    max_samples: int = flag(-1, help="only the first N images (causal, joint: features); -1: all")
    skip_existing: bool = flag(True, help="do not compute what is stored already")
    verify: bool = flag(False, help="check afterwards that every feature is present and intact")
    recompute: int = flag(0, metavar="K", help="compute K random features again and compare")
    dry_run: bool = flag(False, help="say what would be computed, what it takes, and stop")
    force: bool = flag(False, help="start even if the disk looks too small")

    def __post_init__(self) -> None:
        check_choices(self)
        codec = codec_for(shard_codec(self.feature_dtype, self.codec))
        if codec is not None:
            codec.prepare()
        none = self.max_samples == 0 or self.max_samples < -1
        for name, is_wrong, why in (
            ("batch_size", self.batch_size < 1, "is not a number of frames: give 1 or more"),
            ("num_workers", self.num_workers < 0, "is negative: give 0 (decode in this process) or more"),
            ("max_samples", none, "selects nothing: give a positive number, or -1 for all"),
            ("recompute", self.recompute < 0, "is negative: give a number of features"),
        ):
            if is_wrong:
                raise SettingsError(f"--{name} {getattr(self, name)} {why}")
        if self.ray_actors is not None and self.ray_actors < 1:
            raise SettingsError(f"--ray_actors {self.ray_actors} computes nothing: give 1 or more")
        for name in ("ray_address", "ray_actors"):
            if getattr(self, name) is not None and self.engine != "ray":
                raise SettingsError(f"--{name} is of --engine ray: give that too, or leave --{name} out")
        if self.layers is not None and self.layer != PrecomputeSettings.layer:
            raise SettingsError(
                f"--layer {self.layer} and --layers {self.layers} are both given: give one of them"
            )
        check_pool(self.tokens, self.pool_size)
        _ = self.preprocessing, self.wanted_layers

    @property
    def wanted_layers(self) -> tuple[int, ...]:
        """As given: negative ones count from the end."""
        return (self.layer,) if self.layers is None else parse_layers(self.layers)

    @property
    def pool_size(self) -> tuple[int, int] | None:
        """Rows and columns."""
        return None if self.pool is None else parse_pool(self.pool)

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(image_size=self.image_size, resize_mode=self.resize_mode, alpha=self.alpha)

    @property
    def noun(self) -> str:
        """What is counted."""
        return CONTEXTS[self.context].noun


def check_cache_dir(cache_dir: str) -> None:
    """Raises SettingsError where there is something that is no directory, and none can be made; and for a bucket
    without the package that reads one."""
    if not cache_dir:  # of a variable that is not set: the features would lie in the present directory
        raise SettingsError("--cache_dir is empty, so it names no directory for the features: give one")
    at = absolute(cache_dir)
    if is_url(at):
        require_obstore(at)
        return
    while not os.path.lexists(at):
        at = os.path.dirname(at)
    if not os.path.isdir(at):
        what = f"a link that leads nowhere (to {os.readlink(at)})" if os.path.islink(at) else "no directory"
        raise SettingsError(
            f"--cache_dir {cache_dir} cannot hold a cache, since {at} is {what}: name another place, or remove it"
        )


def choose_device(wanted: str) -> str:
    """The torch device of this process. A launcher's LOCAL_RANK picks the card where no other is named."""
    import torch

    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = wanted.partition(":")
    if kind == "cpu":
        return "cpu"
    if kind != "cuda" or (index and not index.isdigit()):
        raise SettingsError(f"--device {wanted!r} is not known: give cpu, cuda, or cuda:N")
    if not torch.cuda.is_available():
        raise SettingsError(
            f"--device {wanted} asks for a GPU, but this PyTorch ({torch.__version__}) finds none: "
            "check nvidia-smi and CUDA_VISIBLE_DEVICES, or give --device cpu"
        )
    card = int(index or 0) or rank_of("LOCAL_RANK", 0)
    if card >= torch.cuda.device_count():
        raise SettingsError(
            f"--device cuda:{card} does not exist: {torch.cuda.device_count()} GPUs are visible here, counted from 0"
        )
    return f"cuda:{card}"


def choose_compute_dtype(wanted: str, device: str) -> str:
    if wanted != "auto":
        return wanted
    return "bfloat16" if device.startswith("cuda") else "float32"


@dataclass(frozen=True, kw_only=True)
class QwenLimits:
    """What training asks of images: Qwen2.5-VL's merging, from its `config.json`, and the flags' limits."""

    merge_size: int = 2
    min_pixels: int = 0
    max_pixels: int = 1 << 40

    @classmethod
    def read(cls, directory: str, *, min_pixels: int, max_pixels: int) -> QwenLimits:
        """Raises SettingsError where the directory holds no such model, or one of another patch size."""
        vision = _read_json(directory, "config.json").get("vision_config")
        if not isinstance(vision, dict):
            raise SettingsError(
                f"--model_path {directory}: its config.json has no vision_config, so it is no Qwen2.5-VL model; "
                "give the directory of Qwen2.5-VL, or leave --model_path out"
            )
        patch_size = vision.get("patch_size", vision.get("spatial_patch_size"))
        if _is_number(patch_size) and patch_size != PATCH_SIZE:
            raise SettingsError(
                f"--model_path {directory} works on patches of {patch_size} pixels, VGGT on {PATCH_SIZE}: "
                "their grids do not match, so the features cannot be added; use a Qwen2.5-VL model"
            )
        merge_size = vision.get("spatial_merge_size")
        known: dict[str, Any] = {"merge_size": merge_size} if _is_number(merge_size) else {}
        return cls(min_pixels=min_pixels, max_pixels=max_pixels, **known)

    def complaint(self, grid: tuple[int, int]) -> str:
        """What does not fit between a patch grid (h, w) and the model; empty where all fits."""
        h, w = (side - side % self.merge_size for side in grid)
        pixels = h * w * PATCH_SIZE**2
        if not pixels:
            return f"a grid of {grid[0]}x{grid[1]} patches is too small for merging {self.merge_size}x{self.merge_size}"
        if not self.min_pixels <= pixels <= self.max_pixels:
            return (
                f"frames of {h}x{w} patches have {pixels} pixels, outside the model's {self.min_pixels} to "
                f"{self.max_pixels}: its processor would resize them, and its grid no longer match the features; "
                "change --image_size, or --min_pixels and --max_pixels here and in training"
            )
        return ""


def _is_number(value: object) -> bool:
    return isinstance(value, int) and value > 0


def _read_json(directory: str, name: str) -> dict[str, Any]:
    try:
        content = json.loads(read_text(str(Path(directory) / name), 2**20))
    except SmallFileError as error:
        raise SettingsError(
            f"--model_path {directory}: {name} cannot be read, as it {error.reason}; give the directory of a "
            "Qwen2.5-VL model, or leave --model_path out"
        ) from error
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"--model_path {directory}: {name} is not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}

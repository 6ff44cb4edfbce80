"""A small VGGT checkpoint with the real tensor names: random weights for the demo and for tests.

The architecture is VGGT's with 384 channels, 4 pairs of blocks and a DINOv2 ViT-S; its values are drawn, not
trained. Each tensor depends on its own name, its shape and the seed alone.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from vggt_cache.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "embed_dim": 384,
    "img_size": 518,
    "patch_size": 14,
    "depth": 4,
    "num_heads": 6,
    "patch_embed": "dinov2_vits14_reg",
}
RECIPE_VERSION = 1
"""Raised whenever the same seed gives other weights."""

_VIT_BLOCKS = 12
_REGISTERS = 4
_VARIANTS = 2
"""VGGT's special tokens come in two variants: for the first frame and for all later ones."""

Shape = tuple[int, ...]
Weights = npt.NDArray[np.float32]


def tensor_shapes() -> dict[str, Shape]:
    """Names and shapes of all tensors of the checkpoint, `aggregator.*` and one of a head."""
    return dict(_names())


def _names() -> Iterator[tuple[str, Shape]]:
    width, patch = CONFIG["embed_dim"], CONFIG["patch_size"]
    positions = (CONFIG["img_size"] // patch) ** 2 + 1
    yield "aggregator.camera_token", (1, _VARIANTS, 1, width)
    yield "aggregator.register_token", (1, _VARIANTS, _REGISTERS, width)
    tower = "aggregator.patch_embed"
    yield f"{tower}.cls_token", (1, 1, width)
    yield f"{tower}.pos_embed", (1, positions, width)
    yield f"{tower}.register_tokens", (1, _REGISTERS, width)
    yield f"{tower}.mask_token", (1, width)
    yield from _linear(f"{tower}.patch_embed.proj", (width, 3, patch, patch))
    for index in range(_VIT_BLOCKS):
        yield from _block(f"{tower}.blocks.{index}", width)
    yield from _norm(f"{tower}.norm", width)
    for kind in ("frame_blocks", "global_blocks"):
        for index in range(CONFIG["depth"]):
            yield from _block(f"aggregator.{kind}.{index}", width)
            for name in ("q_norm", "k_norm"):
                yield from _norm(f"aggregator.{kind}.{index}.attn.{name}", width // CONFIG["num_heads"])
    # Real checkpoints bring heads along, which a feature does not need.
    yield from _norm("camera_head.token_norm", 2 * width)


def _block(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield from _norm(f"{name}.norm1", width)
    yield from _linear(f"{name}.attn.qkv", (3 * width, width))
    yield from _linear(f"{name}.attn.proj", (width, width))
    yield f"{name}.ls1.gamma", (width,)
    yield from _norm(f"{name}.norm2", width)
    yield from _linear(f"{name}.mlp.fc1", (4 * width, width))
    yield from _linear(f"{name}.mlp.fc2", (width, 4 * width))
    yield f"{name}.ls2.gamma", (width,)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, shape: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


# ---------------------------------------------------------------- values

_SCALES: tuple[tuple[str, float, float], ...] = (
    # (pattern of the name, mean, standard deviation); a deviation of 0 stands for 1 / sqrt(inputs)
    (r"norm\d?\.weight$", 1.0, 0.1),
    (r"norm\d?\.bias$", 0.0, 0.05),
    (r"global_blocks\.\d+\.ls1\.gamma$", 0.2, 0.05),
    (r"ls1\.gamma$", 0.08, 0.02),
    (r"ls2\.gamma$", 0.25, 0.05),
    (r"pos_embed$", 0.0, 0.02),
    (r"_tokens?$", 0.0, 0.3),
    (r"bias$", 0.0, 0.02),
    (r"weight$", 0.0, 0.0),
)
"""Chosen so that what a patch shows outweighs where it is and what the other patches add: the features of a
random encoder then still show the picture."""


def draw_tensor(name: str, shape: Shape, seed: int) -> Weights:
    """The values of one tensor, float32."""
    mean, deviation = next((m, d) for pattern, m, d in _SCALES if re.search(pattern, name))
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32)))
    values = generator.standard_normal(shape)
    return (mean + (deviation or 1 / math.sqrt(math.prod(shape[1:]))) * values).astype(np.float32)


# ---------------------------------------------------------------- files


def write_checkpoint(directory: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write `config.json` and `model.safetensors` (about 145 MB) into `directory`, and return it as a Path.

    Files that are there from an earlier call with the same seed are left untouched. Raises CheckpointError if
    the directory cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "config.json", (json.dumps(CONFIG, indent=1) + "\n").encode())
        target = folder / "model.safetensors"
        made_by = {"made_by": f"vggt-cache demo {RECIPE_VERSION}, seed {seed}"}
        if not _is_there(target, made_by):
            tensors = {name: draw_tensor(name, shape, seed) for name, shape in _names()}
            _write(target, save(tensors, metadata=made_by))
    except OSError as error:
        raise CheckpointError(
            f"the demo's checkpoint cannot be written to {folder} ({error.strerror or error}): "
            "choose a directory that you can write to, with 150 MB of free space"
        ) from error
    return folder


def _write(target: Path, data: bytes) -> None:
    """Write by renaming a finished file into place; the mode is the umask's (safetensors' own writer makes 0600)."""
    if target.is_file() and target.stat().st_size == len(data) and target.read_bytes() == data:
        return
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, target)


def _is_there(target: Path, made_by: dict[str, str]) -> bool:
    """Whether the file is one that this recipe wrote: files appear by a rename, so one that is there is whole."""
    expected = 4 * sum(math.prod(shape) for _, shape in _names())
    try:
        with open(target, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, 1 << 20)))
            size = os.fstat(file.fileno()).st_size
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return bool(size == 8 + header_bytes + expected and header.get("__metadata__") == made_by)

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
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from vggt_cache.errors import CheckpointError, os_errors_as

_SIZES = {"embed_dim": 384, "img_size": 518, "patch_size": 14, "depth": 4, "num_heads": 6}
CONFIG: dict[str, Any] = {**_SIZES, "patch_embed": "dinov2_vits14_reg"}
RECIPE_VERSION = 1
"""Raised whenever the same seed gives other weights."""

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


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the checkpoint, `aggregator.*` and two of a head."""
    from vggt_cache.encoder import EncoderConfig, expected_shapes

    shapes = expected_shapes(EncoderConfig.from_dict(CONFIG))
    # Real checkpoints bring heads along, which a feature does not need.
    head = {f"camera_head.token_norm.{name}": (2 * CONFIG["embed_dim"],) for name in ("weight", "bias")}
    return {f"aggregator.{name}": shape for name, shape in shapes.items()} | head


def draw_tensor(name: str, shape: tuple[int, ...], seed: int) -> npt.NDArray[np.float32]:
    """The values of one tensor, float32."""
    mean, deviation = next((m, d) for pattern, m, d in _SCALES if re.search(pattern, name))
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()) + (seed << 32)))
    scale = deviation or 1 / math.sqrt(math.prod(shape[1:]))
    return (mean + scale * generator.standard_normal(shape)).astype(np.float32)


def write_checkpoint(directory: str | os.PathLike[str], *, seed: int = 0) -> Path:
    """Write `config.json` and `model.safetensors` (about 145 MB) into `directory`, and return it as a Path.

    Files that are there from an earlier call with the same seed are left untouched. Raises CheckpointError if
    the directory cannot be written.
    """
    folder = Path(directory)
    tensors = {name: draw_tensor(name, shape, seed) for name, shape in tensor_shapes().items()}
    weights = save(tensors, metadata={"made_by": f"vggt-cache demo {RECIPE_VERSION}, seed {seed}"})
    config = (json.dumps(CONFIG, indent=1) + "\n").encode()
    remedy = ": choose a directory that you can write to, with 150 MB of free space"
    with os_errors_as(CheckpointError, f"the demo's checkpoint cannot be written to {folder}", remedy):
        folder.mkdir(parents=True, exist_ok=True)
        for target, data in ((folder / "config.json", config), (folder / "model.safetensors", weights)):
            if not target.is_file() or target.read_bytes() != data:
                # safetensors' own writer makes files of mode 0600.
                target.with_name(".tmp").write_bytes(data)
                target.with_name(".tmp").replace(target)
    return folder

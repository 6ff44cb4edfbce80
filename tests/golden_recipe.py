"""Deterministic weights and images of the golden files, and the comparison with them.

The golden files in assets/golden were made once by running the published VGGT and JanusVLN code (torch 2.13, float32,
CPU) on these weights and images. A weight depends on its name and shape only; an image on integer arithmetic only.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "assets" / "golden"
SMALL_CONFIG = {
    "embed_dim": 384,
    "img_size": 518,
    "patch_size": 14,
    "depth": 4,
    "num_heads": 6,
    "patch_embed": "dinov2_vits14_reg",
}
WEIGHTS_CRC32 = 463268168
EPS_PROBE = (
    (r"patch_embed\.patch_embed\.proj\.", 0.0005),
    (r"(pos_embed|cls_token|register_tokens)$", 0.005),
    (r"^patch_embed\.blocks\.\d+\.ls[12]\.", 0.002),
    (r"^patch_embed\.norm\.", 0.005),
    (r"^(camera|register)_token$", 0.01),
    (r"^(frame|global)_blocks\.\d+\.attn\.qkv\.", 0.01),
    (r"^(frame|global)_blocks\.[123]\.ls1\.", 100.0),
)
"""Factors by name that make activations so small that every LayerNorm eps matters."""


def make_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """float32; `name` is the one below `aggregator.`."""
    draws = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).standard_normal(shape)
    offset, scale = _offset_and_scale(name, shape)
    return torch.from_numpy((offset + scale * draws).astype(np.float32))


def _offset_and_scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if re.search(r"norm\d?\.weight$", name):
        return 1.0, 0.1
    if re.search(r"norm\d?\.bias$", name) or name.endswith("pos_embed"):
        return 0.0, 0.1
    if name.endswith(".gamma"):
        return 0.5, 0.1
    if name.endswith("mask_token"):
        return 0.0, 0.02
    if re.search(r"(_token|register_tokens)$", name):
        return 0.0, 0.5
    if name.endswith(".bias"):
        return 0.0, 0.05
    return 0.0, 1 / math.sqrt(math.prod(shape[1:]))


def make_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: make_weight(name, shape) for name, shape in shapes.items()}


def probe(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with EPS_PROBE applied."""
    factors = {name: next((f for rule, f in EPS_PROBE if re.search(rule, name)), 1.0) for name in weights}
    return {name: weight * factors[name] for name, weight in weights.items()}


def image(seed: int, height: int, width: int, step: int = 0) -> Tensor:
    """uint8 [height, width, 3]: slanted triangle waves and a box; each step moves them 7 px right and 3 px down."""
    dx, dy = 7 * step, 3 * step
    draw = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width].astype(np.int64)
    out = np.empty((height, width, 3), np.int64)
    for channel in range(3):
        a1, b1, a2, b2 = draw.integers(-5, 6, 4).tolist()
        period1, period2 = draw.integers(40, 200, 2).tolist()
        phase1, phase2 = draw.integers(0, 1000, 2).tolist()
        wave1 = _triangle((a1 or 1) * (x + dx) + b1 * (y + dy) + phase1, period1)
        wave2 = _triangle(a2 * (x + dx) + (b2 or 2) * (y + dy) + phase2, period2)
        out[..., channel] = (2 * wave1 + wave2) // 3
    left, top = draw.integers(0, 1000, 2).tolist()
    colour = draw.integers(0, 256, 3)
    w, h = max(width // 4, 1), max(height // 4, 1)
    left, top = (left + 2 * dx) % max(width - w, 1), (top + 2 * dy) % max(height - h, 1)
    out[top : top + h, left : left + w] = colour
    return torch.from_numpy(out.astype(np.uint8))


def _triangle(value: npt.NDArray[np.int64], half_period: int) -> npt.NDArray[np.int64]:
    value = np.mod(value, 2 * half_period)
    return np.minimum(value, 2 * half_period - value) * 255 // half_period


def stored(name: str) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of a golden file."""
    with np.load(GOLDEN / name) as file:
        return dict(file)


def largest_difference(
    golden: Mapping[str, npt.NDArray[np.generic]], key: str, tokens: Tensor, special: int
) -> float:
    """Of [n, channels] `tokens`, the first `special` of which are no patches, from the four arrays stored of them."""
    values = tokens.double().numpy()
    patches = len(values) - special
    chosen = sorted({special + i * (patches - 1) // 15 for i in range(16)})
    rows = [*range(special), *chosen]
    norm = math.sqrt((values**2).sum())
    found = {
        "sub": values[rows][:, ::4],
        "tok_norm": np.sqrt((values**2).sum(1)),
        "ch_mean": values.mean(0),
        "stats": np.array([values.mean(), values.std(), norm, np.abs(values).max()]),
    }
    return max(_difference(found[name], golden[f"{key}/{name}"], name) for name in found)


def _difference(found: npt.NDArray[np.float64], stored: npt.NDArray[np.generic], name: str) -> float:
    expected = stored.astype(np.float64)
    assert found.shape == expected.shape
    scale = np.maximum(np.abs(expected), 1e-3) if name == "stats" else np.ones_like(expected)
    return float((np.abs(found - expected) / scale).max())

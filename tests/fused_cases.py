"""The fused kernels in Triton's interpreter beside the plain path: one JSON line of differences, by case.

A process of its own, because Triton decides at its import whether kernels are interpreted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from vggt_cache.encoder import Encoder, EncoderConfig, blocks, fused
from vggt_cache.encoder.blocks import Block, rope_table
from vggt_cache.encoder.causal import encode_lists

CPU = torch.device("cpu")
SHAPES = {
    "1B": (1024, 16, 2, (1, 2), True),
    "1B tower": (1024, 16, 1, (1, 3), False),
    "small, one image": (384, 6, 1, (1, 2), True),
    "small tower, batch of three": (384, 6, 3, (1, 1), False),
    "heads of 60": (240, 4, 1, (1, 3), True),
    "heads of 4": (12, 3, 2, (1, 1), True),
    "giant": (1536, 24, 1, (1, 1), True),
}
"""C, heads, batch, grid, whether there is rotation."""
INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda x: x,
    "every second": lambda x: torch.cat([x, x + 1])[::2],
    "expanded": lambda x: x[:1].expand(len(x) + 1, -1, -1),
    "of another order": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


def block_of(channels: int, heads: int, qk_norm: bool, dtype: torch.dtype) -> Block:
    block = Block(channels, heads, eps=1e-5, qk_norm=qk_norm, dtype=dtype).requires_grad_(False)
    for parameter in block.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    return block


def one(shape: str, kind: str, dtype: torch.dtype) -> dict[str, float]:
    channels, heads, batch, grid, rotated = SHAPES[shape]
    block = block_of(channels, heads, rotated, dtype)
    x = INPUTS[kind](torch.randn(batch, 5 + grid[0] * grid[1], channels) * 2 + 0.5)
    rope = rope_table(grid, 5, channels // heads, CPU) if rotated else None
    before, plain = x.clone(), block.project(x, rope)
    q, k, v = fused.project(block, x, rope)
    differences = {
        name: relative(found, expected) for name, found, expected in zip("qkv", (q, k, v), plain, strict=True)
    }
    # As in causal context: more keys than queries.
    k, v = torch.cat([plain[1]] * 2, dim=1), torch.cat([plain[2], plain[2] + 1], dim=1)
    finished, expected = fused.finish(block, x, plain[0], k, v), block.finish(x, plain[0], k, v)
    differences["finish"] = relative(finished - x, expected - x)
    differences["of the input"] = float((x - before).abs().max())
    return differences


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def whole_encoder() -> float:
    """Causal features: tower, both kinds of blocks, keys of earlier frames."""
    config = EncoderConfig(embed_dim=384, depth=2, num_heads=6, patch_embed="dinov2_vits14_reg", img_size=56)
    encoder = Encoder(config, layer=-1)
    for name, parameter in encoder.named_parameters():
        is_scale = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
        parameter.copy_(torch.randn_like(parameter) * 0.05 + (0.5 if is_scale else 0.0))
    images = torch.randint(0, 256, (2, 14, 14, 3), dtype=torch.uint8)

    def features() -> Tensor:
        found = dict(
            encode_lists(encoder, [[0, 1], [0, 0]], lambda frame: images[int(str(frame))], batch_size=2)
        )
        return torch.stack([found[0], found[1]])

    plain = features()
    blocks.fused_kernels = lambda device, dtype: fused
    return relative(features(), plain)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    figures: dict[str, dict[str, float]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for shape in SHAPES:
            figures[f"{name}, {shape}"] = one(shape, "as it is", dtype)
    for kind in INPUTS:
        figures[f"float32, {kind}"] = one("small tower, batch of three", kind, torch.float32)
    figures["float32, encoder"] = {"causal": whole_encoder()}
    json.dump(figures, sys.stdout)


if __name__ == "__main__":
    main()

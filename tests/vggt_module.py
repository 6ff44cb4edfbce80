"""VGGT's aggregator as people's models hold it: official names, calls and results, plain torch operations, own writing.

`Aggregator` has the published call, `FrameByFrame` that of JanusVLN. Small: 36 M parameters, as the golden checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import golden_recipe
from vggt_cache.encoder import EncoderConfig, expected_shapes

Pair = tuple[Tensor, Tensor]


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, normed: bool) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = nn.LayerNorm(dim // heads) if normed else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // heads) if normed else nn.Identity()

    def forward(
        self, x: Tensor, at: Tensor | None = None, mask: Tensor | None = None, past: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if past is not None:  # keys are kept as they are before norm and rotation, with an axis of frames
            k, v = (torch.cat([old.flatten(2, 3), new], 2) for old, new in zip(past, (k, v), strict=True))
        kept = k.unflatten(2, (-1, n)), v.unflatten(2, (-1, n))
        q, k = self.q_norm(q), self.k_norm(k)
        if at is not None:
            q, k = _rotated(q, at), _rotated(k, at.repeat(1, k.shape[2] // n, 1))
        seen = functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(seen.transpose(1, 2).reshape(b, n, c)), kept


def _rotated(x: Tensor, at: Tensor) -> Tensor:
    """Half of a head's channels turn with the row, half with the column."""
    out = []
    for half, position in zip(x.chunk(2, dim=-1), at.unbind(-1), strict=True):
        m = half.shape[-1]
        angle = position[:, None, :, None] * 100.0 ** (-torch.arange(0, m, 2, device=x.device) / m)
        angle = torch.cat([angle, angle], dim=-1)
        first, second = half.chunk(2, dim=-1)
        out.append(half * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin())
    return torch.cat(out, dim=-1)


class Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, *, eps: float, normed: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.attn, self.mlp = Attention(dim, heads, normed), Mlp(dim)
        self.ls1, self.ls2 = Scale(dim), Scale(dim)

    def forward(self, x: Tensor, **seen: Any) -> tuple[Tensor, Pair]:
        attended, kept = self.attn(self.norm1(x), **seen)
        x = x + self.ls1(attended)
        return x + self.ls2(self.mlp(self.norm2(x))), kept


class Tower(nn.Module):
    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, side = config.embed_dim, config.img_size // 14
        self.cls_token, self.mask_token = (
            nn.Parameter(torch.zeros(1, 1, dim)),
            nn.Parameter(torch.zeros(1, dim)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, 4, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 14, 14)})
        self.blocks = nn.ModuleList(
            Block(dim, config.vit.num_heads, eps=1e-6, normed=False) for _ in range(config.vit.depth)
        )
        self.norm = nn.LayerNorm(dim, 1e-6)

    def forward(self, images: Tensor) -> Tensor:
        grid = images.shape[-2] // 14, images.shape[-1] // 14
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        square = self.pos_embed[:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2).float()
        places = functional.interpolate(square, size=grid, mode="bicubic", antialias=True).flatten(2).mT
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        registers = self.register_tokens.expand(len(patches), -1, -1)
        x = torch.cat([first, registers, patches + places.to(patches.dtype)], dim=1)
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)[:, 5:]


class Aggregator(nn.Module):
    """`forward(images [B, S, 3, H, W])` -> (list of [B, S, 5 + h * w, 2C], 5). `calls` counts."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        dim, self.depth, self.calls = config.embed_dim, config.depth, 0
        self.camera_token, self.register_token = (nn.Parameter(torch.zeros(1, 2, n, dim)) for n in (1, 4))
        self.patch_embed = Tower(config)
        for name in ("frame_blocks", "global_blocks"):
            blocks = [Block(dim, config.num_heads, eps=1e-5, normed=True) for _ in range(config.depth)]
            self.add_module(name, nn.ModuleList(blocks))
        for name, values in (("_resnet_mean", [0.485, 0.456, 0.406]), ("_resnet_std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(values).view(1, 1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[list[Tensor], int]:
        outputs, _ = self.run(images, [None] * self.depth, 0)
        return outputs, 5

    def run(self, images: Tensor, past: list[Any], frames_before: int) -> tuple[list[Tensor], list[Any]]:
        self.calls += 1
        b, s, _, height, width = images.shape
        h, w = height // 14, width // 14
        mean, std = (part.to(images.dtype) for part in (self._resnet_mean, self._resnet_std))
        patches = self.patch_embed(((images - mean) / std).flatten(0, 1))
        variant = [min(frames_before + frame, 1) for frame in range(s)]
        special = torch.cat([self.camera_token, self.register_token], dim=2)[0, variant].repeat(b, 1, 1)
        x = torch.cat([special, patches], dim=1)
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        at = functional.pad(torch.stack([rows, columns], -1).view(1, -1, 2) + 1, (0, 0, 5, 0)).to(x.device)
        outputs, kept = [], []
        for frame_block, global_block, before in zip(
            self.frame_blocks, self.global_blocks, past, strict=True
        ):
            inside, _ = frame_block(x, at=at)
            together = inside.view(b, -1, inside.shape[-1])
            x, pair = global_block(together, at=at.repeat(1, s, 1), past=before)
            x = x.view_as(inside)
            kept.append(pair)
            outputs.append(torch.cat([inside, x], -1).view(b, s, *x.shape[1:-1], -1))
        return outputs, kept


class FrameByFrame(Aggregator):
    """`forward(frame [1, 1, 3, H, W], past_key_values, use_cache=True)` -> (list, 5, past_key_values)."""

    def forward(  # type: ignore[override]
        self, images: Tensor, past_key_values: Any = None, use_cache: bool = False, past_frame_idx: int = 0
    ) -> tuple[Any, ...]:
        if not use_cache:
            raise NotImplementedError
        before = 0 if past_key_values[0] is None else past_key_values[0][0].shape[2]
        outputs, kept = self.run(images, past_key_values, before)
        past_key_values[:] = kept
        return outputs, 5, past_key_values


def with_golden_weights(config: EncoderConfig, kind: type[Aggregator] = Aggregator) -> Aggregator:
    module = kind(config)
    module.load_state_dict(golden_recipe.make_weights(expected_shapes(config)))
    return module.requires_grad_(False).eval()

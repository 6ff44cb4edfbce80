"""The transformer block that the patch tower and the aggregator share, its rotations, and the patch tower itself.

Shapes: b images or branches, n tokens, C channels. Tensors of queries, keys and values are token-major,
[b, n, heads, head_dim], so that frames are joined along n without moving a head.

Precision: the residual stream, LayerNorm, LayerScale and rotation are float32; matrix products, attention and
GELU are in the dtype of the block's matrices. This is what autocast does to the published model.
What stands here runs everywhere and says what is computed; `fused.py` is the same for bfloat16 on CUDA, faster.
"""

from __future__ import annotations

from functools import lru_cache, partial
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_cache.encoder.config import EncoderConfig

ROPE_BASE = 100.0
QK_NORM_EPS = 1e-5
DINO_EPS = 1e-6
REGISTERS = 4
_KEPT_GRIDS = 16
Grid = tuple[int, int]
"""Rows and columns of patches."""
Rope = tuple[Tensor, Tensor]
"""cos and signed sin, each float32 [n, 1, head_dim]."""
layer_norm = partial(nn.LayerNorm, dtype=torch.float32)
"""float32 whatever the default dtype is."""


@lru_cache(maxsize=64)
def rope_table(grid: Grid, special_tokens: int, head_dim: int, device: torch.device) -> Rope:
    """Rotations for `special_tokens` unrotated tokens and then the patches of `grid`, row-major.

    Patch (r, c) stands at (r + 1, c + 1). The first half of a head's channels turns with the row, the second with
    the column; inside a half of m channels, channel i and i + m/2 form a pair that turns by
    position * 100^(-2i/m) (RoPE, arXiv:2104.09864, in the two-dimensional form of VGGT and CroCo v2).
    """
    h, w = grid
    half = head_dim // 2
    # Made in float64 on the CPU and then rounded, so that every device rotates by the same numbers.
    rows = torch.arange(1, h + 1, device="cpu", dtype=torch.float64).repeat_interleave(w)
    columns = torch.arange(1, w + 1, device="cpu", dtype=torch.float64).repeat(h)
    positions = functional.pad(torch.stack([rows, columns], dim=-1), (0, 0, special_tokens, 0))
    exponents = torch.arange(0, half, 2, device="cpu", dtype=torch.float64) / half
    angles = positions[:, :, None] * ROPE_BASE**-exponents  # [n, 2 axes, m/2]
    cos, sin = angles.cos().float(), angles.sin().float()
    cos, sin = torch.stack([cos, cos], dim=2), torch.stack([-sin, sin], dim=2)
    return cos.view(-1, 1, head_dim).to(device), sin.view(-1, 1, head_dim).to(device)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """`x` [b, n, heads, head_dim] with each pair of channels turned by its token's angle."""
    cos, signed_sin = rope
    partners = x.reshape(*x.shape[:-1], 2, 2, -1).flip(-2).flatten(-3)
    return torch.addcmul(x * cos, partners, signed_sin)


class Attention(nn.Module):
    """Multi-head attention; with `qk_norm`, queries and keys are normed per head and can be rotated."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, dtype=dtype)
        self.q_norm, self.k_norm = (
            layer_norm(dim // heads, QK_NORM_EPS) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.proj = nn.Linear(dim, dim, dtype=dtype)

    def project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `x` [b, n, C], final: keys can be kept and attended to as they are."""
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        if rope is not None:
            q = rotate(self.q_norm(q.float()), rope).to(v.dtype)
            k = rotate(self.k_norm(k.float()), rope).to(v.dtype)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query sees every key. [b, n, C]."""
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        seen = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    def __init__(self, dim: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim, dtype=dtype)
        self.fc2 = nn.Linear(4 * dim, dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def fused_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module of the fused steps where they can be used. It brings Triton, 70 MB, which only a GPU needs."""
    if device.type != "cuda":
        return None
    from vggt_cache.encoder import fused

    return fused if fused.available(device, dtype) else None


class Block(nn.Module):
    """Pre-norm block on a float32 stream `x` [b, n, C], in two steps: what others may attend to, and the rest."""

    def __init__(self, dim: int, heads: int, *, eps: float, qk_norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm1 = layer_norm(dim, eps)
        self.attn = Attention(dim, heads, qk_norm=qk_norm, dtype=dtype)
        self.ls1 = LayerScale(dim)
        self.norm2 = layer_norm(dim, eps)
        self.mlp = Mlp(dim, dtype=dtype)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, rope: Rope | None = None) -> Tensor:
        """The block with attention inside each of the b entries."""
        return self.finish(x, *self.project(x, rope))

    def project(self, x: Tensor, rope: Rope | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [b, n, heads, head_dim]."""
        if (fused := fused_kernels(x.device, self.dtype)) is not None:
            projected: tuple[Tensor, Tensor, Tensor] = fused.project(self, x, rope)
            return projected
        return self.attn.project(self.norm1(x).to(self.dtype), rope)

    def finish(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`k`, `v` may have more tokens than `x` and `q`: those of earlier frames."""
        if (fused := fused_kernels(x.device, self.dtype)) is not None:
            finished: Tensor = fused.finish(self, x, q, k, v)
            return finished
        x = x + self.ls1(self.attn.attend(q, k, v))
        x = x + self.ls2(self.mlp(self.norm2(x).to(self.dtype)))
        return x


class PatchTower(nn.Module):
    """DINOv2 with registers (arXiv:2309.16588): images [b, H, W, 3] to patch tokens float32 [b, h, w, C]."""

    def __init__(self, config: EncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.img_size // config.patch_size
        vit, dim = config.vit, config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, dtype=torch.float32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim, dtype=torch.float32))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, dim, dtype=torch.float32))
        # Holds the weights under their official name and shape. It is applied as a matrix product:
        # cuDNN would compute a float32 convolution in TF32.
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, config.patch_size, dtype=dtype)})
        self.blocks = nn.ModuleList(
            Block(dim, vit.num_heads, eps=DINO_EPS, qk_norm=False, dtype=dtype) for _ in range(vit.depth)
        )
        self.norm = layer_norm(dim, DINO_EPS)
        self._resized: dict[tuple[Grid, torch.device, int, int], Tensor] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        b, height, width, _ = pixels.shape
        h, w, size = height // self.patch_size, width // self.patch_size, self.patch_size
        mean, std = _normalisation(pixels.device)
        shades = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        tiles = ((shades - mean) / std).reshape(b, h, size, w, size, 3)
        # A patch's values in the order of the convolution's weight: channel, row, column.
        values = tiles.permute(0, 1, 3, 5, 2, 4).reshape(b, h * w, -1)
        proj = cast("nn.Conv2d", self.patch_embed["proj"])
        patches = functional.linear(values.to(proj.weight.dtype), proj.weight.flatten(1), proj.bias)
        patches = patches + self._position_of_patches((h, w))
        first = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        x = torch.cat([first.expand(b, -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)[:, 1 + REGISTERS :]
        return out.view(b, h, w, -1)

    def _position_of_patches(self, grid: Grid) -> Tensor:
        """The learned square of embeddings resized to `grid`: float32 [1, h * w, C]."""
        learned = self.pos_embed
        key = (grid, learned.device, learned.data_ptr(), learned._version)  # other weights are another key
        if key not in self._resized:
            if len(self._resized) >= _KEPT_GRIDS:
                self._resized.clear()
            square = learned[:, 1:].view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            if grid != (self.side, self.side):
                square = functional.interpolate(square, size=grid, mode="bicubic", antialias=True)
            self._resized[key] = square.flatten(2).transpose(1, 2).contiguous()
        return self._resized[key]


@lru_cache(maxsize=16)
def _normalisation(device: torch.device) -> Tensor:
    """ImageNet mean and standard deviation per RGB channel, as DINOv2 was trained."""
    return torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32, device=device)

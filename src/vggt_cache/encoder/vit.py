"""The patch tower: DINOv2 with registers (arXiv:2309.16588), one image at a time, images to patch tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_cache.encoder.blocks import Block, Grid, layer_norm
from vggt_cache.encoder.config import EncoderConfig

DINO_EPS = 1e-6
REGISTERS = 4
_KEPT_GRIDS = 16


class PatchProjection(nn.Module):
    """14 x 14 pixels of 3 channels to one token."""

    def __init__(self, dim: int, patch_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        # Holds the weights under their official name and shape. It is applied as a matrix product:
        # cuDNN would compute a float32 convolution in TF32.
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size, dtype=dtype)

    def forward(self, patches: Tensor) -> Tensor:
        """`patches` float32 [b, h * w, 3 * 14 * 14] to [b, h * w, C]."""
        weight = self.proj.weight.flatten(1)
        return functional.linear(patches.to(weight.dtype), weight, self.proj.bias)


class PatchTower(nn.Module):
    """Images uint8 [b, H, W, 3] to patch tokens float32 [b, h * w, C], row-major."""

    def __init__(self, config: EncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.side = config.img_size // config.patch_size
        vit, dim = config.vit, config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim, dtype=torch.float32))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, dim, dtype=torch.float32))
        self.register_tokens = nn.Parameter(torch.zeros(1, REGISTERS, dim, dtype=torch.float32))
        self.patch_embed = PatchProjection(dim, config.patch_size, dtype=dtype)
        self.blocks = nn.ModuleList(
            Block(dim, vit.num_heads, eps=DINO_EPS, qk_norm=False, dtype=dtype) for _ in range(vit.depth)
        )
        self.norm = layer_norm(dim, DINO_EPS)
        self._resized: dict[tuple[Grid, torch.device, int, int], Tensor] = {}

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed(self._patches(pixels))
        _, h, w, _ = pixels.shape
        patches = patches + self._position_of_patches((h // self.patch_size, w // self.patch_size))
        first = torch.cat([self.cls_token + self.pos_embed[:, :1], self.register_tokens], dim=1)
        x = torch.cat([first.expand(len(pixels), -1, -1), patches], dim=1)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)[:, 1 + REGISTERS :]
        return out

    def _patches(self, pixels: Tensor) -> Tensor:
        """Normalised pixels, one row per patch in the order of the convolution's weight (channel, row, column)."""
        mean, std = _normalisation(pixels.device)
        normal = (pixels.float() / 255 - mean) / std
        b, height, width, _ = pixels.shape
        size = self.patch_size
        tiles = normal.reshape(b, height // size, size, width // size, size, 3).permute(0, 1, 3, 5, 2, 4)
        return tiles.reshape(b, -1, 3 * size * size)

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
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet mean and standard deviation per RGB channel, as DINOv2 was trained."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float32, device=device)
    return mean, torch.tensor([0.229, 0.224, 0.225], dtype=torch.float32, device=device)

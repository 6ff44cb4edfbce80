"""What all steps share: the device, the shapes, encoders with random weights, pictures, and differences.

With `dry` all of it is tiny and on the CPU: it shows that every step runs, and says nothing about speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench_encoder import HEIGHT_OF_640x480, matrix_peak, random_encoder
from vggt_cache.encoder import Encoder, EncoderConfig

FUSED, ATTENTION = "VGGT_CACHE_FUSED", "VGGT_CACHE_SDPA"
"""Environment variables that the encoder goes by: 0 for its plain path; auto, flash or cudnn."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a step runs, and how large."""

    dry: bool
    work: Path
    """A folder in memory (/dev/shm) that is removed when all steps have ended."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def compute_dtype(self) -> str:
        """What precompute chooses on this device."""
        return "float32" if self.dry else "bfloat16"

    @property
    def size(self) -> str:
        return "dry" if self.dry else "1b"

    @property
    def config(self) -> EncoderConfig:
        """VGGT-1B, or the least that has two pairs of blocks."""
        if not self.dry:
            return EncoderConfig()
        return EncoderConfig(embed_dim=384, depth=2, num_heads=6, patch_embed="dinov2_vits14_reg")

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the images: VGGT's and JanusVLN's."""
        return (70,) if self.dry else (518, 644)

    @property
    def measurement_s(self) -> float:
        """Least length of one measurement."""
        return 0.01 if self.dry else 0.7

    def encoder(self, compute_dtype: str | None = None) -> Encoder:
        return random_encoder(self.config, self.device, compute_dtype or self.compute_dtype)

    def images(self, width: int, count: int) -> Tensor:
        """uint8 [count, H, W, 3] in host memory: a pattern that drifts, with noise of its own in each."""
        height = HEIGHT_OF_640x480[width]
        generator = torch.Generator().manual_seed(1)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        waves = torch.stack([127 + 90 * torch.sin((x * (c + 1) + 2 * y) / 90) for c in range(3)], -1)
        noise = torch.randint(-30, 31, (count, height, width, 3), generator=generator)
        drift = 3 * torch.arange(count)[:, None, None, None]
        return (waves + noise + drift).clamp(0, 255).to(torch.uint8)

    def matrix_peak(self) -> float:
        """FLOP/s of the largest matrix product in bfloat16."""
        return matrix_peak(self.device, torch.bfloat16, self.measurement_s, side=256 if self.dry else 8192)

    @contextmanager
    def attention(self, kernel: str) -> Iterator[None]:
        """Attention by `flash` or `cudnn` alone; `default` leaves the choice to torch and to the encoder.

        The encoder goes by an environment variable, whatever else calls attention by torch's context.
        """
        if self.dry or kernel == "default":
            yield
            return
        backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        with environment(ATTENTION, kernel), sdpa_kernel([backends[kernel]]):
            yield


def has_fused_path(encoder: Encoder) -> bool:
    """Whether this encoder, on its device and in its dtype, takes fused kernels unless told otherwise."""
    try:
        from vggt_cache.encoder import fused
    except ImportError:
        return False
    dtype = torch.bfloat16 if encoder.compute_dtype == "bfloat16" else torch.float32
    return bool(fused.available(encoder.device, dtype))


def plain_path() -> AbstractContextManager[None]:
    """No fused kernels meanwhile."""
    return environment(FUSED, "0")


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable with this value meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """Relative L2 distance, in float64 on the CPU."""
    reference = reference.double().cpu()
    return float((found.double().cpu() - reference).norm() / reference.norm())

"""Each LayerNorm has its own eps. Activations are made so small that each of them shows, and the expected values come
from the formulas written out in float64 below, over whole sequences with a causal mask, with no keys kept."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import golden_recipe
from vggt_cache.encoder import Encoder, EncoderConfig, expected_shapes

FRAMES = 2


@dataclasses.dataclass(frozen=True)
class Eps:
    vit_blocks: float = 1e-6
    vit_norm: float = 1e-6
    blocks: float = 1e-5
    qk: float = 1e-5


class Reference:
    """The aggregator in float64, [frames, n, C] at once."""

    def __init__(self, weights: dict[str, Tensor], eps: Eps, heads: int = 6) -> None:
        self.w = {name: weight.double() for name, weight in weights.items()}
        self.eps = eps
        self.heads = heads

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def block(self, x: Tensor, name: str, eps: float, grid: tuple[int, int] | None, joined: bool) -> Tensor:
        f, n, c = x.shape
        qkv = self.linear(self.norm(x, f"{name}.norm1", eps), f"{name}.attn.qkv")
        q, k, v = qkv.view(f, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [frames, heads, n, head_dim]
        if grid:
            q = self.turn(self.norm(q, f"{name}.attn.q_norm", self.eps.qk), grid)
            k = self.turn(self.norm(k, f"{name}.attn.k_norm", self.eps.qk), grid)
        outputs = []
        for i in range(f):
            seen = range(i + 1) if joined else [i]
            keys, values = (torch.cat([part[j] for j in seen], dim=1) for part in (k, v))
            weights = torch.softmax(q[i] @ keys.transpose(1, 2) / math.sqrt(c / self.heads), dim=-1)
            outputs.append((weights @ values).transpose(0, 1).reshape(n, c))
        x = x + self.w[f"{name}.ls1.gamma"] * self.linear(torch.stack(outputs), f"{name}.attn.proj")
        hidden = self.linear(self.norm(x, f"{name}.norm2", eps), f"{name}.mlp.fc1")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        return x + self.w[f"{name}.ls2.gamma"] * self.linear(hidden, f"{name}.mlp.fc2")

    def turn(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Pair by pair, as rotations of complex numbers."""
        half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
        places = [(0, 0)] * 5 + [(r + 1, c + 1) for r in range(grid[0]) for c in range(grid[1])]
        parts = []
        for axis in (0, 1):
            place = torch.tensor([at[axis] for at in places], dtype=torch.float64)
            angle = place[:, None] * 100 ** (-2 * torch.arange(quarter, dtype=torch.float64) / half)
            own = x[..., axis * half : (axis + 1) * half]
            turned = torch.complex(own[..., :quarter], own[..., quarter:]) * torch.polar(
                torch.ones_like(angle), angle
            )
            parts += [turned.real, turned.imag]
        return torch.cat(parts, dim=-1)

    def tower(self, images: Tensor) -> Tensor:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64)
        pixels = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
        name = "patch_embed.patch_embed.proj"
        x = functional.conv2d(pixels, self.w[f"{name}.weight"], self.w[f"{name}.bias"], stride=14)
        position = self.w["patch_embed.pos_embed"]
        square = position[:, 1:].view(1, 37, 37, -1).permute(0, 3, 1, 2)
        square = functional.interpolate(square, size=x.shape[-2:], mode="bicubic", antialias=True)
        patches = (x + square).flatten(2).transpose(1, 2)
        first = [self.w["patch_embed.cls_token"] + position[:, :1], self.w["patch_embed.register_tokens"]]
        x = torch.cat([*(token.expand(len(images), -1, -1) for token in first), patches], dim=1)
        for i in range(12):
            x = self.block(x, f"patch_embed.blocks.{i}", self.eps.vit_blocks, None, joined=False)
        return self.norm(x, "patch_embed.norm", self.eps.vit_norm)[:, 5:]

    def outputs(self, images: Tensor) -> Tensor:
        """After the last pair: [frames, n, 2C]."""
        patches = self.tower(images)
        grid = (images.shape[1] // 14, images.shape[2] // 14)
        variants = [0] + [1] * (len(images) - 1)
        camera, register = (self.w[f"{name}_token"][0, variants] for name in ("camera", "register"))
        x = torch.cat([camera, register, patches], dim=1)
        for i in range(4):
            inside = self.block(x, f"frame_blocks.{i}", self.eps.blocks, grid, joined=False)
            x = self.block(inside, f"global_blocks.{i}", self.eps.blocks, grid, joined=True)
        return torch.cat([inside, x], dim=-1)


@pytest.fixture(scope="module")
def weights(small_config: EncoderConfig) -> dict[str, Tensor]:
    return golden_recipe.probe(golden_recipe.make_weights(expected_shapes(small_config)))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.stack([golden_recipe.image(23, 98, 98, number) for number in range(FRAMES)])


@pytest.fixture(scope="module")
def found(small_config: EncoderConfig, weights: dict[str, Tensor], images: Tensor) -> Tensor:
    """The encoder's tokens after the last pair, [frames, n, 2C]."""
    encoder = Encoder(small_config, layer=-1, tokens="all")
    encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
    history = encoder.new_history((7, 7), rows=1, frames=FRAMES)
    tokens = [
        encoder.extend(encoder.patch_tokens(image[None]), history, [0], place, want_feature=[True])
        for place, image in enumerate(images)
    ]
    return torch.cat([one for one in tokens if one is not None])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_small_activations_agree_with_the_formulas_in_float64(
    weights: dict[str, Tensor], images: Tensor, found: Tensor
) -> None:
    assert error(found, Reference(weights, Eps()).outputs(images)) < 1e-5


@pytest.mark.parametrize("which", ["vit_blocks", "vit_norm", "blocks", "qk"])
def test_another_eps_anywhere_would_be_seen(
    weights: dict[str, Tensor], images: Tensor, found: Tensor, which: str
) -> None:
    wrong = 1e-5 if which.startswith("vit") else 1e-6
    others = dataclasses.replace(Eps(), **{which: wrong})
    assert error(found, Reference(weights, others).outputs(images)) > 1e-4

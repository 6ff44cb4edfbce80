"""VGGT's aggregator (arXiv:2503.11651) up to the layer that is needed, for single frames and causal sequences.

A frame is n = 5 + h * w tokens: camera, four registers, patches row-major. Each of the `depth` pairs is a frame
block (attention inside the frame) and a global block (attention to the frame itself and all earlier frames
of its sequence). Output i is [after frame block i, after global block i] side by side: 2C channels.

Earlier frames enter only as keys and values of the global blocks, already normed and rotated (`FrameCache`),
so a prefix that many sequences share is computed once. Module and parameter names are the official ones
below `aggregator.`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from vggt_cache.encoder.blocks import Block, Grid, rope_table
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.numerics import own_numerics
from vggt_cache.encoder.vit import PatchTower
from vggt_cache.errors import FrameError, SettingsError

AGGREGATOR_EPS = 1e-5
REGISTERS = 4
SPECIAL_TOKENS = 1 + REGISTERS
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, eq=False)
class FrameCache:
    """What later frames need of one frame. Never modified; any number of branches may share it."""

    keys_values: Tensor
    """[pairs, 2, n, heads, head_dim] in the compute dtype: keys (normed, rotated) and values."""
    grid: Grid


class Encoder(nn.Module):
    """The aggregator, frozen, with the pairs 0..layer only.

    compute_dtype: `float32` or `bfloat16`, for matrix products and attention; all else is float32. Autocast,
    TF32 and gradient settings of the caller do not change a result. A new Encoder has random weights;
    `Checkpoint.load` gives one with trained weights.
    """

    def __init__(self, config: EncoderConfig, *, layer: int = -2, compute_dtype: str = "float32") -> None:
        super().__init__()
        if compute_dtype not in _DTYPES:
            raise SettingsError(
                f"compute_dtype is {compute_dtype!r}, which is none of {', '.join(_DTYPES)}: choose one of these"
            )
        self.config = config
        self.layer = config.absolute_layer(layer)
        self.compute_dtype = compute_dtype
        dim = config.embed_dim
        # Variant 0 is for the first frame of a sequence, variant 1 for every later one.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim, dtype=torch.float32))
        self.register_token = nn.Parameter(torch.zeros(1, 2, REGISTERS, dim, dtype=torch.float32))
        self.patch_embed = PatchTower(config, dtype=_DTYPES[compute_dtype])
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(self._new_block() for _ in range(self.layer + 1)) for _ in range(2)
        )
        self.requires_grad_(False).eval()

    def _new_block(self) -> Block:
        config, dtype = self.config, _DTYPES[self.compute_dtype]
        return Block(config.embed_dim, config.num_heads, eps=AGGREGATOR_EPS, qk_norm=True, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return self.camera_token.device

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """The patch tower's output, which depends on each image alone.

        `pixels`: uint8 [b, H, W, 3] on any device, H and W multiples of 14. Returns float32 [b, h * w, C].
        """
        patch_grid(pixels)
        with own_numerics(self.device):
            tokens: Tensor = self.patch_embed(pixels.to(self.device, non_blocking=True))
        return tokens

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Features of single images, each the first and only frame it knows (context `frame`).

        `pixels`: as for `patch_tokens`. Returns float32 [b, h, w, 2C].
        """
        alone: list[list[FrameCache]] = [[] for _ in pixels]
        yes, no = [True] * len(pixels), [False] * len(pixels)
        tokens = self.patch_tokens(pixels)
        features, _ = self.extend(tokens, patch_grid(pixels), alone, want_feature=yes, want_cache=no)
        assert features is not None
        return features

    def extend(
        self,
        tokens: Tensor,
        grid: Grid,
        prefixes: Sequence[Sequence[FrameCache]],
        *,
        want_feature: Sequence[bool],
        want_cache: Sequence[bool],
        on_pair: Callable[[int, Tensor], None] | None = None,
    ) -> tuple[Tensor | None, list[FrameCache | None]]:
        """One causal step of b branches: each appends one frame to a sequence of equal length.

        tokens: `patch_tokens` of the new frames, [b, h * w, C]; all have the patch grid `grid` = (h, w).
        prefixes: per branch the caches of its earlier frames, oldest first; none for a first frame.
        want_feature, want_cache: per branch, whether its feature or its cache is needed. Work that neither needs
            is not done.
        on_pair: for inspection: called after pair i as on_pair(i, [b, n, 2C]); in the last pair
            with the branches that want a feature only.

        Returns the features [wanted, h, w, 2C] in float32, in the order of the branches that want one (None if no
        branch does), and per branch its cache or None. Raises FrameError when a prefix has another grid.
        """
        _check_branches(tokens, grid, prefixes, want_feature, want_cache)
        caches = [self._empty_cache(grid) if wanted else None for wanted in want_cache]
        rows = [row for row, wanted in enumerate(want_feature) if wanted]
        if not rows and not any(want_cache):
            return None, caches
        with own_numerics(self.device):
            rope = rope_table(grid, SPECIAL_TOKENS, self.config.head_dim, self.device)
            x = self._with_special_tokens(tokens, first=not prefixes[0])
            for pair, (frame_block, global_block) in enumerate(self._pairs()):
                inside = frame_block(x, rope)
                q, k, v = global_block.project(inside, rope)
                _keep(caches, pair, k, v)
                if pair == self.layer and len(rows) < len(tokens):
                    if not rows:
                        return None, caches
                    inside, q, k, v = (part[rows] for part in (inside, q, k, v))
                    prefixes = [prefixes[row] for row in rows]
                k, v = (_joined(prefixes, pair, which, new) for which, new in enumerate((k, v)))
                x = global_block.finish(inside, q, k, v)
                if on_pair is not None:
                    on_pair(pair, torch.cat([inside, x], dim=-1))
            patches = torch.cat([inside[:, SPECIAL_TOKENS:], x[:, SPECIAL_TOKENS:]], dim=-1)
            return patches.view(len(x), *grid, -1), caches

    def _pairs(self) -> Iterator[tuple[Block, Block]]:
        for pair in zip(self.frame_blocks, self.global_blocks, strict=True):
            yield cast("tuple[Block, Block]", pair)

    def _with_special_tokens(self, tokens: Tensor, *, first: bool) -> Tensor:
        variant = 0 if first else 1
        special = torch.cat([self.camera_token[:, variant], self.register_token[:, variant]], dim=1)
        return torch.cat([special.expand(len(tokens), -1, -1), tokens], dim=1)

    def _empty_cache(self, grid: Grid) -> FrameCache:
        heads, head_dim = self.config.num_heads, self.config.head_dim
        shape = (self.layer + 1, 2, SPECIAL_TOKENS + grid[0] * grid[1], heads, head_dim)
        return FrameCache(
            keys_values=torch.empty(shape, dtype=_DTYPES[self.compute_dtype], device=self.device), grid=grid
        )


def patch_grid(pixels: Tensor) -> Grid:
    """(h, w) in patches of images uint8 [b, H, W, 3]. Raises ValueError for anything else."""
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
        raise ValueError(f"pixels must be uint8 [b, H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
    if pixels.shape[1] % 14 or pixels.shape[2] % 14:
        raise ValueError(f"image sides must be multiples of 14, not {pixels.shape[1]} x {pixels.shape[2]}")
    return pixels.shape[1] // 14, pixels.shape[2] // 14


def _check_branches(
    tokens: Tensor,
    grid: Grid,
    prefixes: Sequence[Sequence[FrameCache]],
    want_feature: Sequence[bool],
    want_cache: Sequence[bool],
) -> None:
    if not 0 < len(tokens) == len(prefixes) == len(want_feature) == len(want_cache):
        raise ValueError("tokens, prefixes, want_feature and want_cache need one entry per branch")
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a grid of {grid[0]} x {grid[1]} patches")
    if len({len(prefix) for prefix in prefixes}) > 1:
        raise ValueError("all branches of one step need the same number of earlier frames")
    for cache in (cache for prefix in prefixes for cache in prefix):
        if cache.grid != grid:
            raise mixed_grids(grid, cache.grid)


def mixed_grids(grid: Grid, earlier: Grid) -> FrameError:
    """Keys are kept rotated for their own grid, and VGGT gives no meaning to a sequence of several sizes."""
    return FrameError(
        f"a frame has {grid[0]} x {grid[1]} patches (rows x columns), but an earlier frame of its list has "
        f"{earlier[0]} x {earlier[1]}: VGGT's features are not defined for lists of mixed image sizes; use images of "
        "one size in a list, or --resize_mode pad, which makes all images square"
    )


def _keep(caches: Sequence[FrameCache | None], pair: int, k: Tensor, v: Tensor) -> None:
    for row, cache in enumerate(caches):
        if cache is not None:
            cache.keys_values[pair, 0] = k[row]
            cache.keys_values[pair, 1] = v[row]


def _joined(prefixes: Sequence[Sequence[FrameCache]], pair: int, which: int, new: Tensor) -> Tensor:
    """Keys (which = 0) or values (1) of each branch's earlier frames and the `new` one [b, n, heads, head_dim]."""
    if not prefixes[0]:
        return new
    chunks: list[Tensor] = []
    for prefix, own in zip(prefixes, new, strict=True):
        chunks += [cache.keys_values[pair, which] for cache in prefix]
        chunks.append(own)
    return torch.cat(chunks).view(len(new), -1, *new.shape[2:])

"""VGGT's aggregator (arXiv:2503.11651) up to the layer that is needed: single frames, causal sequences, joint lists.

A frame is n = 5 + h * w tokens: camera, four registers, patches row-major. Each of the `depth` pairs is a frame
block (attention inside the frame) and a global block (attention to the frame itself and all earlier frames
of its sequence; in a joint list to all frames). Output i is [after frame block i, after global block i] side by side:
2C channels.

Earlier frames enter only as keys and values of the global blocks, already normed and rotated (`History`), so a prefix
that many sequences share is computed once. Module and parameter names are the official ones below `aggregator.`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from vggt_cache.encoder.blocks import Block, Grid, PatchTower, rope_table
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.history import History, pick
from vggt_cache.encoder.numerics import own_numerics
from vggt_cache.errors import FrameError, require_one_of
from vggt_cache.identity import SPECIAL_TOKENS, TOKENS, check_grid, check_pool

AGGREGATOR_EPS = 1e-5
REGISTERS = SPECIAL_TOKENS - 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Encoder(nn.Module):
    """The aggregator, frozen, with the pairs up to the highest of `layers` only.

    layer: which outputs a feature is made of, one or several; negative ones count from the end.
    tokens, pool: what of each frame's tokens it keeps, see FeatureSpec. The shape of one frame's feature is [h, w, 2C]
        for `patches` and else [n, 2C], with an axis of layers in front where there are several.
    compute_dtype: `float32` or `bfloat16`, for matrix products and attention; all else is float32. Autocast,
    TF32 and gradient settings of the caller do not change a result. A new Encoder has random weights;
    `Checkpoint.load` gives one with trained weights.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        layer: int | Sequence[int] = -2,
        tokens: str = "patches",
        pool: tuple[int, int] | None = None,
        compute_dtype: str = "float32",
    ) -> None:
        super().__init__()
        require_one_of("compute_dtype", compute_dtype, _DTYPES)
        require_one_of("tokens", tokens, TOKENS)
        check_pool(tokens, pool)
        self.config = config
        self.layers = config.absolute_layers(layer)
        self.layer = self.layers[-1]
        """The highest, behind which nothing is computed."""
        self.tokens, self.pool = tokens, pool
        self.compute_dtype = compute_dtype
        dim, heads, dtype = config.embed_dim, config.num_heads, _DTYPES[compute_dtype]
        # Variant 0 is for the first frame of a sequence, variant 1 for every later one.
        self.camera_token = nn.Parameter(torch.zeros(1, 2, 1, dim, dtype=torch.float32))
        self.register_token = nn.Parameter(torch.zeros(1, 2, REGISTERS, dim, dtype=torch.float32))
        self.patch_embed = PatchTower(config, dtype=dtype)
        pairs = self.layer + 1
        blocks = [Block(dim, heads, eps=AGGREGATOR_EPS, qk_norm=True, dtype=dtype) for _ in range(2 * pairs)]
        self.frame_blocks, self.global_blocks = nn.ModuleList(blocks[:pairs]), nn.ModuleList(blocks[pairs:])
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.camera_token.device

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        """The patch tower's output, which depends on each image alone.

        `pixels`: [b, H, W, 3] on any device, uint8, or float32 where 1 is what 255 is to uint8; H and W multiples of
        14, else ValueError. Returns float32 [b, h, w, C].
        """
        known = pixels.dtype in (torch.uint8, torch.float32)
        if not known or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(
                f"pixels must be uint8 or float32 [b, H, W, 3], not {pixels.dtype} {list(pixels.shape)}"
            )
        b, height, width, _ = pixels.shape
        if height % 14 or width % 14:
            raise ValueError(f"image sides must be multiples of 14, not {height} x {width}")
        with own_numerics(self.device, b, height // 14, width // 14):
            tokens: Tensor = self.patch_embed(pixels.to(self.device, non_blocking=True))
        return tokens

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Features of single images, each the first and only frame it knows (context `frame`).

        `pixels`: as for `patch_tokens`. Returns float32 [b, h, w, 2C], or what else `tokens` and `layers` make.
        """
        features = self.extend(self.patch_tokens(pixels), None, want_feature=[True] * len(pixels))
        assert features is not None
        return features

    def joint_features(self, tokens: Tensor) -> Tensor:
        """Features of lists of frames that all see each other (context `joint`), as VGGT was trained.

        `tokens`: `patch_tokens` of the frames in order, [lists, frames, h, w, C]. Returns float32
        [lists, frames, h, w, 2C], or what else `tokens` and `layers` make of each frame.
        """
        lists, frames, h, w, _ = tokens.shape
        outputs: list[Tensor] = []

        def together(part: Tensor) -> Tensor:
            """From frames to lists: [lists * frames, n, ...] to [lists, frames * n, ...]."""
            return part.view(lists, frames, *part.shape[1:]).flatten(1, 2)

        with own_numerics(self.device, lists, frames, h * w):
            rope = rope_table((h, w), SPECIAL_TOKENS, self.config.head_dim, self.device)
            special = torch.cat([self._special(int(frame > 0)) for frame in range(frames)])
            x = torch.cat([special.repeat(lists, 1, 1), tokens.flatten(2, 3).flatten(0, 1)], dim=1)
            for pair, (frame_block, global_block) in self._pairs():
                inside = frame_block(x, rope)
                q, k, v = global_block.project(inside, rope)
                if pair == self.layer:
                    inside, q = self._needed(inside, q)
                seen = global_block.finish(*map(together, (inside, q, k, v)))
                x = seen.view_as(inside)
                if pair in self.layers:
                    outputs.append(self._kept(inside, x, (h, w)))
            features = self._feature(outputs)
            return features.view(lists, frames, *features.shape[1:])

    def new_history(self, grid: Grid, *, rows: int, frames: int) -> History:
        """Room for what `rows` sequences of up to `frames` frames will have seen."""
        tokens = SPECIAL_TOKENS + grid[0] * grid[1]
        shape = (rows, frames, tokens, self.config.num_heads, self.config.head_dim)
        return History(grid, self.layer + 1, shape, _DTYPES[self.compute_dtype], self.device)

    def extend(
        self,
        tokens: Tensor,
        history: History | None,
        rows: Sequence[int] = (),
        place: int = 0,
        *,
        want_feature: Sequence[bool],
        frames: int | None = None,
    ) -> Tensor | None:
        """One causal step of b branches: each appends one frame to a sequence of equal length.

        tokens: `patch_tokens` of the new frames, [b, h, w, C].
        history, rows: the branches' earlier frames: branch i is row rows[i]. The new frame is written into it at
            `place`. None: each frame is the first of its sequence, and no later one will see it.
        want_feature: per branch, whether its feature is needed. Work for the history alone stops at the last keys.
        frames: how many frames the new one sees, itself included: the places 0..frames-1. Default: place + 1.

        Returns the features [wanted, h, w, 2C] in float32 (or what else `tokens` and `layers` make), in the order of
        the branches that want one (None if no branch does). Raises FrameError when the history has another grid.
        """
        frames = place + 1 if frames is None else frames
        if not 0 < len(tokens) == len(want_feature):
            raise ValueError("tokens and want_feature need one entry per branch")
        b, h, w, _ = tokens.shape
        if history is not None:
            _check_places(history, (h, w), b, rows, place, frames)
        elif frames != 1:
            raise ValueError("without a history a frame sees itself alone")
        wanted = [branch for branch, wants in enumerate(want_feature) if wants]
        if not wanted and history is None:
            return None
        with own_numerics(self.device, b, len(wanted), h * w, frames):
            rope = rope_table((h, w), SPECIAL_TOKENS, self.config.head_dim, self.device)
            special = self._special(0 if frames == 1 else 1)
            x = torch.cat([special.expand(b, -1, -1), tokens.flatten(1, 2)], dim=1)
            outputs: list[Tensor] = []
            for pair, (frame_block, global_block) in self._pairs():
                inside = frame_block(x, rope)
                q, k, v = global_block.project(inside, rope)
                if history is not None:
                    history.put(pair, rows, place, k, v)
                if pair == self.layer and len(wanted) < b:
                    if not wanted:
                        return None
                    inside, q, k, v = (pick(part, wanted) for part in (inside, q, k, v))
                    rows = [rows[branch] for branch in wanted] if rows else rows
                    outputs = [pick(output, wanted) for output in outputs]
                if history is not None and frames > 1:
                    k, v = history.seen(pair, rows, frames)
                if pair == self.layer:
                    inside, q = self._needed(inside, q)
                x = global_block.finish(inside, q, k, v)
                if pair in self.layers:
                    outputs.append(self._kept(inside, x, (h, w)))
            return self._feature(outputs)

    def _pairs(self) -> Iterable[tuple[int, tuple[Block, Block]]]:
        blocks = zip(self.frame_blocks, self.global_blocks, strict=True)
        return enumerate(cast("Iterable[tuple[Block, Block]]", blocks))

    def _special(self, variant: int) -> Tensor:
        """[1, 5, C]: variant 0 is for the first frame of a list, variant 1 for every later one."""
        return torch.cat([self.camera_token[:, variant], self.register_token[:, variant]], dim=1)

    # ------------------------------------------------------------ what is kept

    def _needed(self, *parts: Tensor) -> list[Tensor]:
        """Of the last pair's [b, n, ...]: where only special tokens are kept, only their output is computed."""
        return [part[:, :SPECIAL_TOKENS] for part in parts] if self.tokens == "special" else list(parts)

    def _kept(self, inside: Tensor, x: Tensor, grid: Grid) -> Tensor:
        """The two halves [b, n, C] of an output as a feature keeps them: [b, h, w, 2C] or [b, n, 2C]."""
        if self.tokens == "patches+camera":
            return torch.cat(
                [torch.cat([half[:, :1], half[:, SPECIAL_TOKENS:]], 1) for half in (inside, x)], -1
            )
        first, end = {"patches": (SPECIAL_TOKENS, None), "special": (0, SPECIAL_TOKENS), "all": (0, None)}[
            self.tokens
        ]
        kept = torch.cat([half[:, first:end] for half in (inside, x)], dim=-1)
        if self.tokens != "patches":
            return kept
        patches = kept.view(len(kept), *grid, -1)
        if self.pool is None:
            return patches
        check_grid(self.pool, grid)
        pooled: Tensor = functional.adaptive_avg_pool2d(patches.permute(0, 3, 1, 2), self.pool)
        return pooled.permute(0, 2, 3, 1)

    def _feature(self, outputs: Sequence[Tensor]) -> Tensor:
        """One for each of `layers`: side by side where there are several."""
        return outputs[0].contiguous() if len(outputs) == 1 else torch.stack(list(outputs), dim=1)


def _check_places(
    history: History, grid: Grid, branches: int, rows: Sequence[int], place: int, frames: int
) -> None:
    if len(set(rows)) != len(rows) or len(rows) != branches:
        raise ValueError("each branch needs a row of its own")
    if not place < frames <= history.frames:
        raise ValueError(f"place {place} of {frames} frames does not lie in the history's {history.frames}")
    if history.grid != grid:
        raise mixed_grids(grid, history.grid)


def mixed_grids(grid: Sequence[int], earlier: Sequence[int]) -> FrameError:
    """Keys are kept rotated for their own grid, and VGGT gives no meaning to a sequence of several sizes."""
    return FrameError(
        f"a frame has {grid[0]} x {grid[1]} patches (rows x columns), but an earlier frame of its list has "
        f"{earlier[0]} x {earlier[1]}: VGGT's features are not defined for lists of mixed image sizes; use images of "
        "one size in a list, or --resize_mode pad, which makes all images square"
    )

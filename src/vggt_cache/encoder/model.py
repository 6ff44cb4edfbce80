"""VGGT's aggregator (arXiv:2503.11651) up to the layer that is needed, for single frames and causal sequences.

A frame is n = 5 + h * w tokens: camera, four registers, patches row-major. Each of the `depth` pairs is a frame
block (attention inside the frame) and a global block (attention to the frame itself and all earlier frames
of its sequence). Output i is [after frame block i, after global block i] side by side: 2C channels.

Earlier frames enter only as keys and values of the global blocks, already normed and rotated (`History`), so a prefix
that many sequences share is computed once. Module and parameter names are the official ones below `aggregator.`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vggt_cache.encoder.blocks import Block, Grid, PatchTower, rope_table
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.history import History, pick
from vggt_cache.encoder.numerics import own_numerics
from vggt_cache.errors import FrameError, SettingsError

AGGREGATOR_EPS = 1e-5
REGISTERS = 4
SPECIAL_TOKENS = 1 + REGISTERS
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
                f"compute_dtype is {compute_dtype!r}, which is not one of {', '.join(_DTYPES)}: choose one of these"
            )
        self.config = config
        self.layer = config.absolute_layer(layer)
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

        `pixels`: uint8 [b, H, W, 3] on any device, H and W multiples of 14, else ValueError. Returns float32
        [b, h, w, C].
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
            raise ValueError(f"pixels must be uint8 [b, H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
        b, height, width, _ = pixels.shape
        if height % 14 or width % 14:
            raise ValueError(f"image sides must be multiples of 14, not {height} x {width}")
        with own_numerics(self.device, b, height // 14, width // 14):
            tokens: Tensor = self.patch_embed(pixels.to(self.device, non_blocking=True))
        return tokens

    def frame_features(self, pixels: Tensor) -> Tensor:
        """Features of single images, each the first and only frame it knows (context `frame`).

        `pixels`: as for `patch_tokens`. Returns float32 [b, h, w, 2C].
        """
        features = self.extend(self.patch_tokens(pixels), None, want_feature=[True] * len(pixels))
        assert features is not None
        return features

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
        on_pair: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor | None:
        """One causal step of b branches: each appends one frame to a sequence of equal length.

        tokens: `patch_tokens` of the new frames, [b, h, w, C].
        history, rows: the branches' earlier frames: branch i is row rows[i]. The new frame is written into it at
            `place`. None: each frame is the first of its sequence, and no later one will see it.
        want_feature: per branch, whether its feature is needed. Work for the history alone stops at the last keys.
        frames: how many frames the new one sees, itself included: the places 0..frames-1. Default: place + 1.
        on_pair: for inspection: called after pair i as on_pair(i, [b, n, 2C]); in the last pair
            with the branches that want a feature only.

        Returns the features [wanted, h, w, 2C] in float32, in the order of the branches that want one (None if no
        branch does). Raises FrameError when the history has another grid.
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
            variant = 0 if frames == 1 else 1
            special = torch.cat([self.camera_token[:, variant], self.register_token[:, variant]], dim=1)
            x = torch.cat([special.expand(b, -1, -1), tokens.flatten(1, 2)], dim=1)
            blocks = zip(self.frame_blocks, self.global_blocks, strict=True)
            for pair, (frame_block, global_block) in enumerate(cast("Iterable[tuple[Block, Block]]", blocks)):
                inside = frame_block(x, rope)
                q, k, v = global_block.project(inside, rope)
                if history is not None:
                    history.put(pair, rows, place, k, v)
                if pair == self.layer and len(wanted) < b:
                    if not wanted:
                        return None
                    inside, q, k, v = (pick(part, wanted) for part in (inside, q, k, v))
                    rows = [rows[branch] for branch in wanted] if rows else rows
                if history is not None and frames > 1:
                    k, v = history.seen(pair, rows, frames)
                x = global_block.finish(inside, q, k, v)
                if on_pair is not None:
                    on_pair(pair, torch.cat([inside, x], dim=-1))
            patches = torch.cat([half[:, SPECIAL_TOKENS:] for half in (inside, x)], dim=-1)
            return patches.view(len(x), h, w, -1)


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

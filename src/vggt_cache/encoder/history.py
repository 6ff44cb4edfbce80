"""Keys and values of the frames that causal sequences have seen, kept where attention reads them.

Attention to earlier frames needs their keys and values as one run. A run that is put together anew in every pair
costs a copy of the whole history for each frame; here each sequence has a row with room for its longest form,
every frame's keys and values are written once, and attention reads the row in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggt_cache.encoder.blocks import Grid


class History:
    """`rows` sequences of frames with one patch grid, each with room for `frames` frames.

    Who uses it decides which row holds which sequence, and at which place of the row a frame stands. The order of
    places means nothing to attention. Memory: rows * frames * pairs * 2 * n * heads * head_dim values, for good.
    """

    def __init__(
        self, grid: Grid, pairs: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        """`shape`: rows, frames, and of one frame's keys n tokens, heads, head_dim."""
        self.grid = grid
        self.frames = shape[1]
        # One tensor per pair: [keys and values, rows, frames, n, heads, head_dim].
        self._pairs = [torch.empty((2, *shape), dtype=dtype, device=device) for _ in range(pairs)]

    def put(self, pair: int, rows: Sequence[int], place: int, k: Tensor, v: Tensor) -> None:
        """Write one frame of each of `rows`: `k`, `v` [b, n, heads, head_dim], keys normed and rotated."""
        even = evenly(rows)
        for kept, new in zip(self._pairs[pair], (k, v), strict=True):
            if even is not None:
                kept[even, place] = new
            else:
                for row, own in zip(rows, new, strict=True):
                    kept[row, place] = own

    def seen(self, pair: int, rows: Sequence[int], frames: int) -> tuple[Tensor, Tensor]:
        """Keys and values [b, frames * n, heads, head_dim] of the first `frames` places of `rows`."""
        k, v = (pick(kept[:, :frames], rows).flatten(1, 2) for kept in self._pairs[pair])
        return k, v

    def copy(self, source: int, target: int, frames: int) -> None:
        """The first `frames` places of row `source` also in row `target`: where two sequences part."""
        for kept in self._pairs:
            kept[:, target, :frames] = kept[:, source, :frames]

    def grow(self, frames: int) -> None:
        """Make room for `frames` frames. Pair by pair, so that old and new are not both whole at any time."""
        for pair, kept in enumerate(self._pairs):
            larger = kept.new_empty((*kept.shape[:2], frames, *kept.shape[3:]))
            larger[:, :, : self.frames] = kept
            self._pairs[pair] = larger
        self.frames = frames


def pick(part: Tensor, rows: Sequence[int]) -> Tensor:
    """`part[rows]`, as a view where the rows are evenly spaced. No index tensor: its transfer would synchronise."""
    even = evenly(rows)
    return part[even] if even is not None else torch.stack([part[row] for row in rows])


def evenly(rows: Sequence[int]) -> slice | None:
    """The slice that picks exactly `rows`, in order, if there is one."""
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    if step < 1 or list(rows) != list(range(rows[0], rows[-1] + 1, step)):
        return None
    return slice(rows[0], rows[-1] + 1, step)

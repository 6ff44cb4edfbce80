"""JanusVLN's call: one frame after the other, each with the keys and values of those before it.

    outputs, 5, past_key_values = aggregator(frame[None, None], past_key_values=past_key_values, use_cache=True)

Of a causal feature the cache needs to know the frames alone. So the entries that the module would leave in the list of
keys and values are `LazyPair`s here, which remember the frames, and the outputs are looked up when one is indexed: all
frames but the last cost nothing. Who looks into an entry, as the eviction in evaluation mode does, has the
module compute the keys and values of the frames so far; from then on the module goes on by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class FramesSeen:
    """One frame [1, 1, 3, H, W], and those that came before it."""

    def __init__(self, images: Tensor, before: FramesSeen | None, module: nn.Module) -> None:
        self._images, self._before, self._module = images, before, module
        self.pairs: list[Any] | None = None
        """Keys and values of each layer, where the module has computed them, as it leaves them."""
        self.outputs: list[Tensor] | None = None
        """Of this frame, if so."""
        kind = images.device.type
        self._autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def images(self) -> Tensor:
        """Of all frames in order, [S, 3, H, W]."""
        return torch.cat([seen._images[0] for seen in self._chain()])

    def autocast(self) -> torch.autocast:
        """As it was when the frame came."""
        enabled, dtype = self._autocast
        return torch.autocast(self._images.device.type, dtype=dtype, enabled=enabled)

    def compute(self) -> list[Any]:
        """The module's keys and values behind this frame."""
        chain = self._chain()
        for number, seen in enumerate(chain):
            if seen.pairs is None:
                before = chain[number - 1].pairs if number else None
                seen._compute(before, number)
        assert self.pairs is not None
        return self.pairs

    def _compute(self, before: list[Any] | None, number: int) -> None:
        pairs: list[Any] = list(before) if before is not None else [None] * len(self._module.frame_blocks)  # type: ignore[arg-type]
        with torch.no_grad(), self.autocast():
            self.outputs, _, self.pairs = self._module(
                self._images, past_key_values=pairs, use_cache=True, past_frame_idx=number
            )

    def _chain(self) -> list[FramesSeen]:
        chain: list[FramesSeen] = []
        seen: FramesSeen | None = self
        while seen is not None:
            chain.append(seen)
            seen = seen._before
        return chain[::-1]


class LazyPair:
    """The keys and values of one layer, computed when they are looked into."""

    def __init__(self, seen: FramesSeen, layer: int) -> None:
        self.seen, self._layer = seen, layer

    def __getitem__(self, index: Any) -> Any:
        return self.seen.compute()[self._layer][index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.seen.compute()[self._layer])

    def __len__(self) -> int:
        return 2

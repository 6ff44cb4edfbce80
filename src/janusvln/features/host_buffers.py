"""Host memory that is used again and again: pinned where a GPU reads from it."""

from __future__ import annotations

import torch

Shape = tuple[int, ...]


class HostBuffers:
    """Tensors by shape. Never more than were in use at one time; for one thread."""

    def __init__(self, dtype: torch.dtype, *, pinned: bool) -> None:
        self._dtype = dtype
        self._pinned = pinned
        self._free: dict[Shape, list[torch.Tensor]] = {}

    def take(self, shape: Shape) -> torch.Tensor:
        """A tensor of any content, until `give_back`."""
        free = self._free.get(shape)
        return free.pop() if free else torch.empty(shape, dtype=self._dtype, pin_memory=self._pinned)

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.setdefault(tuple(buffer.shape), []).append(buffer)

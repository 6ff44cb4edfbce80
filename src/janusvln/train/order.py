"""The order in which samples are trained on: random, the same in every process and after a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

GROUPS_PER_POOL = 50


class EpochOrder(Sampler[int]):
    """A random order of `count` samples, another one in each epoch: the same in every process and after a restart."""

    def __init__(self, count: int, *, seed: int) -> None:
        self._count = count
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        return iter(self._order(torch.Generator().manual_seed(self._seed + self._epoch)).tolist())

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randperm(self._count, generator=generator)


class LengthGroupedOrder(EpochOrder):
    """A random order in which each `group_size` neighbours, which meet in a step, are of similar length.

    Random pools are sorted by length and cut into groups; the groups come in random order.
    """

    def __init__(self, lengths: Sequence[int], *, group_size: int, seed: int) -> None:
        super().__init__(len(lengths), seed=seed)
        self._lengths = torch.as_tensor(lengths)
        self._group_size = group_size

    def _order(self, generator: torch.Generator) -> torch.Tensor:
        groups: list[torch.Tensor] = []
        for pool in torch.split(super()._order(generator), self._group_size * GROUPS_PER_POOL):
            by_length = pool[self._lengths[pool].argsort(descending=True, stable=True)]
            groups += torch.split(by_length, self._group_size)
        # Only the last may not be full, and stays last: in the middle it would shift all that follow.
        rest = [groups.pop()] if len(groups[-1]) < self._group_size else []
        mixed = [groups[at] for at in torch.randperm(len(groups), generator=generator).tolist()]
        return torch.cat([*mixed, *rest])

"""tensordict: one memory-mapped tensor [entries, h, w, channels].

Settings: the map is made for all entries at once and each is assigned to its row, as the documentation shows for data
larger than memory. A map for each feature instead, in a nested TensorDict, would open more slowly. Nothing tells a
row that was written from one that was not.
"""

from __future__ import annotations

import torch
from tensordict import MemoryMappedTensor, TensorDict

from peers.base import Committed, Peer, feature

NAME = "feature"


class TensorDictMap(Peer):
    package = "tensordict"
    synced = False

    def write(self, committed: Committed) -> None:
        count, shape = self.layout.count, self.layout.shape
        one = TensorDict({NAME: torch.empty(shape, dtype=torch.bfloat16)}, [])
        # Expanded, not filled: what is made here is the file, not its contents.
        table = one.expand(count).memmap_like(self.folder)
        rows = table[NAME]
        for number in range(count):
            rows[number].copy_(feature(number, shape))
            committed([number])

    def open(self) -> None:
        self._rows: MemoryMappedTensor = TensorDict.load_memmap(self.folder)[NAME]

    def read(self, number: int) -> torch.Tensor:
        return self._rows[number].clone()

    def read_into(self, number: int, out: torch.Tensor) -> None:
        out.copy_(self._rows[number])

    def close(self) -> None:
        del self._rows

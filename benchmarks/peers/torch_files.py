"""torch.save, one file for each feature.

Settings: `weights_only=True`, so that nothing is unpickled but tensors. With `mmap=True` the file is mapped and one
copy makes the feature its own; without, torch reads the file into fresh memory itself. Both are measured.
"""

from __future__ import annotations

from pathlib import Path

import torch

from peers.base import Committed, Peer, feature


class TorchFiles(Peer):
    package = "torch"
    synced = False

    def write(self, committed: Committed) -> None:
        self.folder.mkdir()
        for number in range(self.layout.count):
            torch.save(feature(number, self.layout.shape), self._path(number))
            committed([number])

    def open(self) -> None:
        pass

    def read(self, number: int) -> torch.Tensor:
        return torch.load(self._path(number), weights_only=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.pt"


class MappedTorchFiles(TorchFiles):
    def read(self, number: int) -> torch.Tensor:
        return torch.load(self._path(number), weights_only=True, mmap=True).clone()

    def read_into(self, number: int, out: torch.Tensor) -> None:
        out.copy_(torch.load(self._path(number), weights_only=True, mmap=True))

"""safetensors: a file for each feature, and shards that stay open.

Settings: `safe_open` maps the file and gives views of the map, so one copy makes a feature its own; `load_file` of a
file with one tensor does no better. Shards are opened once, and a dictionary says which of them has a feature, as
the index of a sharded checkpoint does.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from peers.base import Committed, Peer, feature

NAME = "feature"


class SafetensorsFiles(Peer):
    package = "safetensors"
    synced = False

    def write(self, committed: Committed) -> None:
        self.folder.mkdir()
        for number in range(self.layout.count):
            save_file({NAME: feature(number, self.layout.shape)}, self._path(number))
            committed([number])

    def open(self) -> None:
        pass

    def read(self, number: int) -> torch.Tensor:
        with safe_open(self._path(number), "pt") as file:
            return file.get_tensor(NAME).clone()

    def read_into(self, number: int, out: torch.Tensor) -> None:
        with safe_open(self._path(number), "pt") as file:
            out.copy_(file.get_tensor(NAME))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.safetensors"


class SafetensorsShards(Peer):
    package = "safetensors"
    synced = False

    def write(self, committed: Committed) -> None:
        self.folder.mkdir()
        for numbers in self.layout.groups():
            # All tensors of a file are given at once, so they must be in memory at once.
            tensors = {str(number): feature(number, self.layout.shape).clone() for number in numbers}
            save_file(tensors, self.folder / f"{numbers[0]}.safetensors")
            committed(numbers)

    def open(self) -> None:
        self._home = {}
        for path in self.folder.glob("*.safetensors"):  # a writer that died leaves a file of another name
            shard = safe_open(path, "pt")
            self._home.update(dict.fromkeys(shard.keys(), shard))

    def read(self, number: int) -> torch.Tensor:
        return self._home[str(number)].get_tensor(str(number)).clone()

    def read_into(self, number: int, out: torch.Tensor) -> None:
        out.copy_(self._home[str(number)].get_tensor(str(number)))

    def close(self) -> None:
        self._home.clear()

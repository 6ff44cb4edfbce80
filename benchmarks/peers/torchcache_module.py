"""torchcache: a module whose outputs are kept, one file for each.

Settings: the persistent cache without compression, and none in memory, which would answer instead of the disk. It
finds an output by a hash of the module's input, here the feature's number. What it returns is a buffer that the next
call fills again, so the feature is copied out of it.
"""

from __future__ import annotations

import logging

import torch
from torchcache import set_logger_config, torchcache

from peers.base import Committed, Peer, feature

set_logger_config(level=logging.ERROR)  # it warns of each process that its cache in memory is full


class TorchCacheModule(Peer):
    package = "torchcache"
    synced = False

    def write(self, committed: Committed) -> None:
        module = self._module(fill=True)
        for number in range(self.layout.count):
            module(_input(number))
            committed([number])

    def open(self) -> None:
        self._encoder = self._module(fill=False)

    def read(self, number: int) -> torch.Tensor:
        return self._encoder(_input(number))[0].clone()

    def _module(self, *, fill: bool) -> torch.nn.Module:
        shape = self.layout.shape

        @torchcache(
            persistent=True,
            persistent_cache_dir=str(self.folder),
            max_persistent_cache_size=2**40,
            max_memory_cache_size=0,
            cache_dtype=torch.bfloat16,
        )
        class Encoder(torch.nn.Module):
            def forward(self, numbers: torch.Tensor) -> torch.Tensor:
                number = sum(int(digit) << place for place, digit in enumerate(numbers[0]))
                if not fill:
                    raise KeyError(number)  # not in the cache
                return feature(number, shape)[None]

        return Encoder()


def _input(number: int) -> torch.Tensor:
    """[1, 15], in the features' dtype, which is what comes back; its hash is the number itself."""
    digits = [*(number >> place & 1 for place in range(14)), number >> 14]
    return torch.tensor([digits], dtype=torch.bfloat16)

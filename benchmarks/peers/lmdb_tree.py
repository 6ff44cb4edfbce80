"""LMDB: one B+ tree in a memory-mapped file, a feature a value.

Settings: a transaction for each group of features, committed with the default of an fsync; features appended in the
order of their keys. Readers take no lock (`lock=False`: nobody writes while they read), do not let the kernel read
ahead (`readahead=False`, for random reads) and get views of the map (`buffers=True`), so one copy makes a feature
its own. `writemap=True` would write faster, and less safely.
"""

from __future__ import annotations

import lmdb
import torch

from peers.base import Committed, Peer, feature, from_bytes, payload


class LmdbTree(Peer):
    package = "lmdb"
    synced = True

    def write(self, committed: Committed) -> None:
        # The map's size is a limit, not a size on disk.
        room_bytes = 2 * self.layout.raw_bytes + 8192 * self.layout.count + 2**26
        with lmdb.open(str(self.folder), map_size=room_bytes) as environment:
            for numbers in self.layout.groups():
                with environment.begin(write=True) as transaction:
                    for number in numbers:
                        value = payload(feature(number, self.layout.shape))
                        transaction.put(_key(number), value, append=True)
                committed(numbers)

    def open(self) -> None:
        self._environment = lmdb.open(str(self.folder), readonly=True, lock=False, readahead=False)
        self._transaction = self._environment.begin(buffers=True)

    def read(self, number: int) -> torch.Tensor | None:
        found = self._transaction.get(_key(number))
        return None if found is None else from_bytes(found, self.layout.shape).clone()

    def read_into(self, number: int, out: torch.Tensor) -> None:
        out.copy_(from_bytes(self._transaction.get(_key(number)), self.layout.shape))

    def close(self) -> None:
        self._transaction.abort()
        self._environment.close()


def _key(number: int) -> bytes:
    return number.to_bytes(8, "big")

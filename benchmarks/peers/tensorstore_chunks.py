"""TensorStore: the zarr 3 format written and read in C++, with a checksum (crc32c) for each chunk.

Settings: a chunk for each feature, as with zarr-python; the chunks of a group are written at once, as it can;
`fill_missing_data_reads` off, so that a chunk that was never written is an error and not zeros. Its file driver
writes a file of another name, syncs and renames it.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tensorstore
import torch

from peers.base import Committed, Peer, feature


class TensorStoreChunks(Peer):
    package = "tensorstore"
    synced = True
    start_method = "forkserver"  # its threads do not survive a fork

    def write(self, committed: Committed) -> None:
        store = tensorstore.open(
            self._spec(),
            create=True,
            dtype=tensorstore.bfloat16,
            shape=(self.layout.count, *self.layout.shape),
            chunk_layout=tensorstore.ChunkLayout(chunk_shape=(1, *self.layout.shape)),
            codec=tensorstore.CodecSpec({
                "driver": "zarr3",
                "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
            }),
        ).result()  # fmt: skip
        for numbers in self.layout.groups():
            for writing in [store[number].write(self._values(number)) for number in numbers]:
                writing.result()
            committed(numbers)

    def _values(self, number: int) -> Any:
        """Copied, because many of them are being written at once."""
        bits = feature(number, self.layout.shape).view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16).copy()

    def _spec(self) -> dict[str, Any]:
        return {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{self.folder}/"},
            "fill_missing_data_reads": False,
        }

    def open(self) -> None:
        self._store = tensorstore.open(self._spec(), read=True).result()

    def read(self, number: int) -> torch.Tensor:
        return torch.from_numpy(self._store[number].read().result().view(np.uint16)).view(torch.bfloat16)

    def close(self) -> None:
        del self._store

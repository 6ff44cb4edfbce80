"""zarr-python 3: one array [entries, h, w, channels] in a folder, a chunk and so a file for each feature.

Settings: no compressor, which gains nothing on such values and costs most of the time; no sharding, because a shard
is written as a whole. zarr has no bfloat16 of its own, so the bits are kept as uint16. A chunk that is missing reads
as zeros, so its file is looked for first: without that, a feature that was never written would be served.
"""

from __future__ import annotations

import torch
import zarr

from peers.base import Committed, Peer, feature


class ZarrChunks(Peer):
    package = "zarr"
    synced = False

    def write(self, committed: Committed) -> None:
        array = zarr.create_array(
            self.folder,
            shape=(self.layout.count, *self.layout.shape),
            chunks=(1, *self.layout.shape),
            dtype="uint16",
            compressors=None,
            fill_value=0,
        )
        for number in range(self.layout.count):
            array[number] = feature(number, self.layout.shape).view(torch.uint16).numpy()
            committed([number])

    def open(self) -> None:
        self._array = zarr.open_array(self.folder, mode="r")

    def read(self, number: int) -> torch.Tensor | None:
        if not (self.folder / "c" / str(number) / "0" / "0" / "0").exists():
            return None
        return torch.from_numpy(self._array[number]).view(torch.bfloat16)

"""HDF5 through h5py: one file, a dataset for each feature.

Settings: contiguous datasets, which need no chunk index or cache and are read straight into the caller's memory; no
compression, which gains nothing on such values; a flush after each group of features. HDF5 has no bfloat16, so the
bits are kept as uint16. The default file format: with `libver="latest"` a file whose writer was killed cannot be
opened again without a repair. With a checksum (fletcher32) a dataset must be chunked: one chunk each.
"""

from __future__ import annotations

from typing import Any

import h5py
import torch

from peers.base import Committed, Peer, feature


class Hdf5File(Peer):
    package = "h5py"
    synced = False

    def write(self, committed: Committed) -> None:
        self.folder.mkdir()
        with h5py.File(self.folder / "features.h5", "w") as file:
            for numbers in self.layout.groups():
                for number in numbers:
                    values = feature(number, self.layout.shape).view(torch.uint16).numpy()
                    file.create_dataset(str(number), data=values, **self._options())
                file.flush()
                committed(numbers)

    def _options(self) -> dict[str, Any]:
        return {}

    def open(self) -> None:
        self._file = h5py.File(self.folder / "features.h5", "r")

    def read(self, number: int) -> torch.Tensor:
        out = torch.empty(self.layout.shape, dtype=torch.bfloat16)
        self.read_into(number, out)
        return out

    def read_into(self, number: int, out: torch.Tensor) -> None:
        self._file[str(number)].read_direct(out.view(torch.uint16).numpy())

    def close(self) -> None:
        self._file.close()


class CheckedHdf5File(Hdf5File):
    def _options(self) -> dict[str, Any]:
        return {"chunks": self.layout.shape, "fletcher32": True}

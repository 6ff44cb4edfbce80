"""Lance: a table of rows, each feature a blob.

Settings: the blob encoding, which its documentation recommends for large values and which reads one of them without
decoding its neighbours; fragments appended a group at a time, each of which is a version that is committed. A binary
column is compressed unless told otherwise, and was slower either way.
"""

from __future__ import annotations

from collections.abc import Iterator

import lance
import numpy as np
import pyarrow as pa
import torch

from peers.base import Committed, Peer, feature, from_bytes, payload

NAME = "feature"
SCHEMA = pa.schema([pa.field(NAME, pa.large_binary(), metadata={"lance-encoding:blob": "true"})])


class LanceTable(Peer):
    package = "pylance"
    synced = False
    start_method = "forkserver"  # it warns that it does not survive a fork

    def write(self, committed: Committed) -> None:
        for numbers in self.layout.groups():
            rows = pa.RecordBatchReader.from_batches(SCHEMA, self._rows(numbers))
            lance.write_dataset(rows, self.folder, mode="append" if numbers[0] else "create")
            committed(numbers)

    def _rows(self, numbers: range) -> Iterator[pa.RecordBatch]:
        for number in numbers:
            # Copied, because Lance may ask for rows ahead of writing them.
            value = payload(feature(number, self.layout.shape)).tobytes()
            offsets = pa.py_buffer(np.array([0, len(value)], np.int64))
            column = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(value)])
            yield pa.record_batch([column], schema=SCHEMA)

    def open(self) -> None:
        self._table = lance.dataset(self.folder)

    def read(self, number: int) -> torch.Tensor:
        return from_bytes(self._blob(number).readall(), self.layout.shape)

    def _blob(self, number: int) -> lance.BlobFile:
        return self._table.take_blobs(NAME, indices=[number])[0]

    def close(self) -> None:
        del self._table

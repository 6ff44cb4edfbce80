"""MosaicML Streaming: MDS shards, read from local disk.

Settings: raw bytes without compression; hashes only concern shards that are downloaded, so none are made. The index
is written by `finish`, and nothing can be read before. Batches come from its StreamingDataLoader, which needs the
batch size to divide the samples among the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from streaming import MDSWriter, StreamingDataLoader, StreamingDataset

from peers.base import Committed, Peer, feature, from_bytes, payload

NAME = "feature"


class MosaicShards(Peer):
    package = "mosaicml-streaming"
    synced = False

    def write(self, committed: Committed) -> None:
        shard_bytes = self.layout.per_commit * (self.layout.record_bytes + 64)
        with MDSWriter(out=str(self.folder), columns={NAME: "bytes"}, size_limit=shard_bytes) as writer:
            for number in range(self.layout.count):
                writer.write({NAME: payload(feature(number, self.layout.shape)).tobytes()})
        committed(range(self.layout.count))

    def open(self) -> None:
        self._samples = StreamingDataset(local=str(self.folder), batch_size=1)

    def read(self, number: int) -> torch.Tensor:
        return self._feature(self._samples[number])

    def _feature(self, sample: dict[str, Any]) -> torch.Tensor:
        return from_bytes(sample[NAME], self.layout.shape)

    def _features(self, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [self._feature(sample) for sample in samples]

    def close(self) -> None:
        del self._samples

    def batches(self, batch_size: int, workers: int) -> Iterable[Sequence[torch.Tensor]]:
        samples = StreamingDataset(local=str(self.folder), batch_size=batch_size, shuffle=True)
        return StreamingDataLoader(
            samples,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=self._features,
            persistent_workers=True,
        )

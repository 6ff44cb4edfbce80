"""WebDataset: tar files, read from front to back only.

Settings: uncompressed tars of raw bytes, without its encoders; a shard is complete when its writer has closed it.
Batches come from its own WebLoader, shards divided among the workers and shuffled, and samples shuffled in a buffer
of two batches. A single feature can only be had by reading its shard up to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import webdataset

from peers.base import Committed, Peer, feature, from_bytes, payload

NAME = "bin"


class WebDatasetTars(Peer):
    package = "webdataset"
    synced = False
    random_access = False

    def write(self, committed: Committed) -> None:
        self.folder.mkdir()
        groups = iter(self.layout.groups())
        writer = webdataset.ShardWriter(
            f"{self.folder}/%06d.tar",
            maxcount=self.layout.per_commit,
            maxsize=float("inf"),
            encoder=False,
            verbose=0,
            post=lambda name: committed(next(groups)),
        )
        with writer:
            for number in range(self.layout.count):
                value = payload(feature(number, self.layout.shape))
                writer.write({"__key__": f"{number:09d}", NAME: value})

    def open(self) -> None:
        pass

    def read(self, number: int) -> torch.Tensor | None:
        shard = f"{self.folder}/{number // self.layout.per_commit:06d}.tar"
        samples = webdataset.WebDataset([shard], shardshuffle=False, empty_check=False)
        for sample in samples:
            if sample["__key__"] == f"{number:09d}":
                return self._feature(sample)
        return None

    def _feature(self, sample: dict[str, Any]) -> torch.Tensor:
        return from_bytes(sample[NAME], self.layout.shape)

    def batches(self, batch_size: int, workers: int) -> Iterable[Sequence[torch.Tensor]]:
        shards = sorted(str(path) for path in self.folder.glob("*.tar"))
        samples = webdataset.WebDataset(
            shards, shardshuffle=len(shards), workersplitter=webdataset.split_by_worker, empty_check=False
        )
        samples = samples.shuffle(2 * batch_size).map(self._feature).batched(batch_size, collation_fn=list)
        return webdataset.WebLoader(samples, batch_size=None, num_workers=workers, persistent_workers=True)

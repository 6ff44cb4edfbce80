"""LitData: chunks that `optimize` writes, read from local disk.

Settings: chunks of as many features as the other peers' shards hold, without compression; tensors by its own
serialiser, which has no bfloat16, so the bits are kept as uint16. `optimize` starts a worker process, forked because
spawning takes seconds, and that is part of the writing; the index comes last, and nothing can be read before. Batches
come from its StreamingDataLoader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import litdata
import torch

from peers.base import Committed, Layout, Peer, feature

NAME = "feature"


class LitDataChunks(Peer):
    package = "litdata"
    synced = False

    def write(self, committed: Committed) -> None:
        litdata.optimize(
            fn=SampleOf(self.layout),
            inputs=list(range(self.layout.count)),
            output_dir=str(self.folder),
            chunk_size=self.layout.per_commit,
            num_workers=1,
            keep_data_ordered=True,
            start_method="fork",
            verbose=False,
        )
        committed(range(self.layout.count))

    def open(self) -> None:
        self._samples = litdata.StreamingDataset(str(self.folder))

    def read(self, number: int) -> torch.Tensor:
        return _feature(self._samples[number]).clone()  # it is a view of the mapped chunk

    def close(self) -> None:
        del self._samples

    def batches(self, batch_size: int, workers: int) -> Iterable[Sequence[torch.Tensor]]:
        samples = litdata.StreamingDataset(str(self.folder), shuffle=True)
        return litdata.StreamingDataLoader(
            samples,
            batch_size=batch_size,
            num_workers=workers,
            collate_fn=_features,
            persistent_workers=True,
            multiprocessing_context=self.start_method,
        )


class SampleOf:
    """What `optimize` calls in its worker."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def __call__(self, number: int) -> dict[str, torch.Tensor]:
        return {NAME: feature(number, self._layout.shape).view(torch.uint16)}


def _feature(sample: dict[str, Any]) -> torch.Tensor:
    return sample[NAME].view(torch.bfloat16)


def _features(samples: list[dict[str, Any]]) -> list[torch.Tensor]:
    return [_feature(sample) for sample in samples]

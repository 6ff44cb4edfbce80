"""This project's store: shards as precompute writes them, read by FeatureCache and, in batches, by ReadAhead."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from peers.base import Committed, Layout, Peer, feature
from vggt_cache.delivery import ReadAhead
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, ShardWriter, create_store
from vggt_cache.store.writer import DEFAULT_MAX_RECORDS


def key_of(number: int) -> bytes:
    """Spread evenly, as the keys of real frames are."""
    return random.Random(number).randbytes(16)


class Ours(Peer):
    package = "vggt-feature-cache"
    synced = True

    def __init__(self, folder: Path, layout: Layout) -> None:
        super().__init__(folder, layout)
        self.spec = FeatureSpec(
            encoder=EncoderSpec(
                weights_digest="0" * 64, embed_dim=layout.shape[2] // 2, depth=24, num_heads=16, img_size=518,
                patch_size=14, patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
            ),
            preprocessing=Preprocessing(image_size=644),
        )  # fmt: skip
        # A shard ends at precompute's limit of records, however small they are.
        self._layout_of_shards = Layout(
            shape=layout.shape, count=layout.count, per_commit=min(layout.per_commit, DEFAULT_MAX_RECORDS)
        )

    def write(self, committed: Committed) -> None:
        store_dir = create_store(self.folder, self.spec)
        for numbers in self._layout_of_shards.groups():
            with ShardWriter(store_dir, self.spec) as writer:
                for number in numbers:
                    writer.append(key_of(number), feature(number, self.layout.shape))
                writer.commit()
            committed(numbers)
        with FeatureCache.open(self.folder, context="frame") as cache:
            cache.save_index()

    def open(self) -> None:
        self._cache = FeatureCache.open(self.folder, context="frame")

    def read(self, number: int) -> torch.Tensor | None:
        return self._cache.get_by_key(key_of(number))

    def read_into(self, number: int, out: torch.Tensor) -> None:
        self._cache.get_by_key(key_of(number), out=out)

    def close(self) -> None:
        self._cache.close()

    def batches(self, batch_size: int, workers: int) -> ReadBatches:
        return ReadBatches(self, batch_size, workers)


class ReadBatches:
    """As the trainer takes them: threads instead of worker processes, the next batch read while this one is used."""

    def __init__(self, peer: Ours, batch_size: int, threads: int) -> None:
        self._keys = [key_of(number) for number in range(peer.layout.count)]
        self._batch_size = batch_size
        self._reader = ReadAhead(
            FeatureCache.open(peer.folder, context="frame"), torch.device("cpu"), threads=threads
        )

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        order = random.sample(self._keys, len(self._keys))
        batches = [order[at : at + self._batch_size] for at in range(0, len(order), self._batch_size)]
        ahead = [self._reader.start(key) for key in batches[0]]
        for following in [*batches[1:], []]:
            reads, ahead = ahead, [self._reader.start(key) for key in following]
            features = [self._reader.wait(read) for read in reads]
            yield [found for found in features if found is not None]
            for read in reads:
                self._reader.release(read)

"""Epochs over a slow cache of which records are staged on this machine's disk.

Theory. The cache lies behind a wire that gives --mb_per_s and answers each request after --latency_ms; what is staged
lies under --folder, in page cache, where it costs next to nothing. Every epoch reads each feature once, in an order of
its own, as the training loop does: in batches, announced one ahead, checksums verified.

    alone     no stage: the wire's speed, which nothing without a stage can beat
    through   the first epoch with an empty stage: the same bytes over the wire, and each is written here beside it. It
              should take 1.00 of `alone`
    staged    the epoch behind it: nothing is asked of the cache
    part      the same with a limit of --share of the records: that share of the reads is local, and the rest takes its
              time on the wire, so an epoch should take 1 - share of `alone`

Beside the hit rate of `part` stands that of a cache of the same size that evicts what was used longest ago, on the same
orders, and what theory says of it: c + (1 - c) ln(1 - c).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

import record
from vggt_cache.delivery import Delivery
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.staged import Staging

GRID = (35, 46)
"""(h, w) in patches of 640x480 frames at 644 pixels: 6.6 MB a record."""
SPEC = FeatureSpec(
    encoder=EncoderSpec(
        weights_digest="0" * 64, embed_dim=1024, depth=24, num_heads=16, img_size=518, patch_size=14,
        patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
    ),
    preprocessing=Preprocessing(image_size=644),
)  # fmt: skip


class Wire(FileSystem):
    """The system's files behind a wire that all threads share."""

    def __init__(self, bytes_per_s: float, latency_s: float) -> None:
        self.bytes_per_s, self.latency_s = bytes_per_s, latency_s
        self.bytes = 0
        self._lock = threading.Lock()
        self._free_s = 0.0

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = super().preadv(fd, buffers, offset)
        with self._lock:
            self.bytes += count
            self._free_s = max(time.perf_counter(), self._free_s) + count / self.bytes_per_s
            until_s = self._free_s + self.latency_s
        time.sleep(max(0.0, until_s - time.perf_counter()))
        return count


def write_cache(cache_dir: Path, count: int) -> list[bytes]:
    store_dir, feature = create_store(cache_dir, SPEC), torch.randn((*GRID, SPEC.encoder.channels)).bfloat16()
    keys = [os.urandom(16) for _ in range(count)]
    for first in range(0, count, 16):
        with ShardWriter(store_dir, SPEC, max_records=16) as writer:
            for number, key in enumerate(keys[first : first + 16], first):
                feature[0, 0, 0] = number
                writer.append(key, feature)
            writer.commit()
    return keys


class Bench:
    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.given, self.folder = given, folder
        self.keys = write_cache(folder / "cache", given.features)
        self.wire = Wire(1e6 * given.mb_per_s, 1e-3 * given.latency_ms)
        self.orders: list[list[bytes]] = []

    def epoch(self, stage: Staging | None) -> tuple[float, float, int]:
        """Seconds, the share of local reads, and bytes over the wire; what is staged is committed behind that."""
        order = random.Random(len(self.orders)).sample(self.keys, len(self.keys))
        self.orders.append(order)
        size = self.given.batch_size
        with FeatureCache.open(self.folder / "cache", spec=SPEC, fs=self.wire, stage=stage) as cache:
            delivery = Delivery(cache, "cpu", threads=self.given.threads)
            begun_bytes, begun_s = self.wire.bytes, time.perf_counter()
            batches = ({"frames": order[at : at + size]} for at in range(0, len(order), size))
            for _ in delivery.ahead(batches):
                pass
            taken_s, stats = time.perf_counter() - begun_s, cache.stats
            delivery.close()
        return taken_s, stats.staged_hits / stats.hits, self.wire.bytes - begun_bytes

    def measure(self) -> dict[str, dict[str, float]]:
        taken: dict[str, list[tuple[float, float, int]]] = {}
        for turn in range(self.given.turns):
            whole = Staging(local_dir=self.folder / f"whole {turn}", limit="1T")
            limit = int(
                self.given.share * sum(path.stat().st_size for path in self.folder.glob("cache/*/shards/*"))
            )
            part = Staging(local_dir=self.folder / f"part {turn}", limit=limit)
            for name, stage in (
                ("alone", None), ("through", whole), ("staged", whole), ("part, first", part), ("part", part)
            ):  # fmt: skip
                taken.setdefault(name, []).append(self.epoch(stage))
        alone_s = statistics.median(seconds for seconds, *_ in taken["alone"])
        return {
            name: {
                "over_alone": statistics.median(seconds for seconds, *_ in values) / alone_s,
                "local": statistics.median(share for _, share, _ in values),
                "wire_bytes": statistics.median(count for *_, count in values),
            }
            for name, values in taken.items()
        }


def lru_hit_rate(orders: Sequence[Sequence[bytes]], size: int) -> float:
    """Of all epochs but the first one, with room for `size` records."""
    kept: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for number, order in enumerate(orders):
        for key in order:
            hits += number > 0 and key in kept
            kept[key] = None
            kept.move_to_end(key)
            if len(kept) > size:
                kept.popitem(last=False)
    return hits / (len(orders) - 1) / len(orders[0])


def run(folder: Path, given: argparse.Namespace) -> None:
    bench = Bench(folder, given)
    ways, share = bench.measure(), given.share
    many = [random.Random(epoch).sample(range(10_000), 10_000) for epoch in range(10)]
    lru = {
        "simulated": lru_hit_rate(
            [[number.to_bytes(4, "big") for number in order] for order in many], int(10_000 * share)
        ),
        "theory": share + (1 - share) * math.log(1 - share),
    }
    for name, figures in ways.items():
        print(
            f"{name:12} {figures['over_alone']:6.2f} of the time alone, {figures['local']:6.1%} of the reads local"
        )
    print(f"LRU of the same size: {lru['simulated']:.1%} of the reads local, in theory {lru['theory']:.1%}")
    figures = {"ways": ways, "lru": lru}
    if given.no_result:
        print(json.dumps(figures))
    else:
        record.write("staging", "cpu", {**vars(given), "folder": None}, figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("features", 96), ("batch_size", 8), ("threads", 2), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, number in (("mb_per_s", 200.0), ("latency_ms", 1.0), ("share", 0.5)):
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument(
        "--folder", help="where cache and stage are made (default: the system's temporary folder)"
    )
    parser.add_argument("--small", action="store_true", help="only see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    given = parser.parse_args()
    if given.small:
        given.features, given.turns = 16, 1
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        run(Path(folder), given)


if __name__ == "__main__":
    main()

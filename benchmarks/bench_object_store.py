"""Reading a cache in a bucket, beside obstore alone on the same objects of the same server.

Theory. A record is one ranged GET, so nothing is faster than obstore's `get_range` of the same bytes by as many
threads: that is the limit, measured in turns with what is compared with it, in the same random order:

    obstore   `get_range`; the bytes stay in obstore's own memory
    copied    the same, copied into memory that is used again and again, which a trainer needs
    cache     `get_by_key(out=)`: the key looked up, the same GET, the same copy, the checksum of all bytes

Without --url a server of moto's is started on this machine (`pip install 'moto[server]'`). It is slower than a real
one, so the processor's seconds a GB of this process stand beside the rates: they are what reading costs where the
server and the network are not the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.request import Request, urlopen

import numpy as np
import obstore
import torch

import record
from moto_server import moto_server
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.place import address_of
from vggt_cache.store import FeatureCache, ShardWriter, create_store, remove_store
from vggt_cache.store.bucket import Bucket

GRID = (35, 46)
"""(h, w) in patches of 640x480 frames at 644 pixels: 6.6 MB a record."""


@contextmanager
def bucket_of_moto() -> Iterator[str]:
    """The URL of a place in a bucket of a server that ends with this."""
    with moto_server() as port:
        endpoint = f"http://127.0.0.1:{port}"
        urlopen(Request(f"{endpoint}/bench", method="PUT")).close()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            os.environ[name] = "bench"
        os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_REGION": "us-east-1"}
        yield "s3://bench/cache"


class Bench:
    def __init__(self, url: str, given: argparse.Namespace) -> None:
        self.given, self.url = given, url
        self.spec = FeatureSpec(
            encoder=EncoderSpec(
                weights_digest="0" * 64, embed_dim=1024, depth=24, num_heads=16, img_size=518, patch_size=14,
                patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
            ),
            preprocessing=Preprocessing(image_size=644),
        )  # fmt: skip
        self.shape = (*GRID, self.spec.encoder.channels)
        self.keys = [os.urandom(16) for _ in range(given.features)]
        self._write()
        self.cache = FeatureCache.open(url, spec=self.spec)
        self.records = {key: self.cache.copies_of(key)[0] for key in self.keys}
        self.buffers = [torch.empty(self.shape, dtype=torch.bfloat16) for _ in range(given.threads)]
        self.address = address_of(url)
        self.client = Bucket(f"{self.address.scheme}://{self.address.bucket}")._reading
        self.order = self.keys[:]

    @property
    def bytes_read(self) -> int:
        return self.buffers[0].nbytes * len(self.keys)

    def _write(self) -> None:
        store_dir, feature = create_store(self.url, self.spec), torch.randn(self.shape).bfloat16()
        for first in range(0, len(self.keys), 16):
            with ShardWriter(store_dir, self.spec, max_records=16) as writer:
                for number, key in enumerate(self.keys[first : first + 16], first):
                    feature[0, 0, 0] = number
                    writer.append(key, feature)
                writer.commit()

    # ------------------------------------------------------------ ways

    def obstore(self, key: bytes, buffer: torch.Tensor) -> None:
        self._range(key)

    def copied(self, key: bytes, buffer: torch.Tensor) -> None:
        target = buffer.view(torch.uint8).numpy().reshape(-1)
        target[:] = np.frombuffer(self._range(key), np.uint8)

    def cached(self, key: bytes, buffer: torch.Tensor) -> None:
        assert self.cache.get_by_key(key, out=buffer) is not None

    def _range(self, key: bytes) -> memoryview:
        shard, found = self.records[key]
        path = f"{self.address.key}/{self.spec.short_name}/shards/{shard}"
        return memoryview(
            obstore.get_range(self.client, path, start=found.offset, length=self.buffers[0].nbytes)
        )

    # ------------------------------------------------------------ turns

    def turn(self, way: Callable[[bytes, torch.Tensor], None]) -> tuple[float, float]:
        """Seconds, and the processor's seconds of this process, for every feature once."""
        threads = self.given.threads

        def part(number: int) -> None:
            for key in self.order[number::threads]:
                way(key, self.buffers[number])

        began_s, used_s = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(part, range(threads)))
        return time.perf_counter() - began_s, time.process_time() - used_s

    def measure(self) -> dict[str, dict[str, float]]:
        ways = {"obstore": self.obstore, "copied": self.copied, "cache": self.cached}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(self.given.turns + 1):
            random.Random(turn).shuffle(self.order)
            for name, way in ways.items():
                seconds = self.turn(way)
                if turn:  # in the first one connections are made
                    taken[name].append(seconds)
        return {
            name: {
                "MB_per_s": self.bytes_read / 1e6 / statistics.median(wall_s for wall_s, _ in values),
                "core_s_per_GB": statistics.median(used_s for _, used_s in values) / (self.bytes_read / 1e9),
            }
            for name, values in taken.items()
        }


def run(url: str, given: argparse.Namespace) -> None:
    bench = Bench(url, given)
    try:
        ways = bench.measure()
    finally:
        bench.cache.close()
        remove_store(url, bench.spec, dry_run=False)
    for name, figures in ways.items():
        print(f"{name:8} {figures['MB_per_s']:8.0f} MB/s {figures['core_s_per_GB']:8.2f} core-s a GB")
    ratio = ways["cache"]["MB_per_s"] / ways["obstore"]["MB_per_s"]
    print(
        f"cache / obstore {ratio:.3f}, cache / copied {ways['cache']['MB_per_s'] / ways['copied']['MB_per_s']:.3f}"
    )
    figures = {"ways": ways, "cache_over_obstore": ratio, "record_bytes": bench.buffers[0].nbytes}
    if given.no_result:
        print(json.dumps(figures))
    else:
        record.write("object_store", "cpu", {**vars(given), "url": bool(given.url)}, figures)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", help="an empty place in a bucket (default: a server of moto's)")
    for name, default in (("features", 32), ("threads", 4), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--small", action="store_true", help="only see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    given = parser.parse_args()
    if given.small:
        given.features, given.turns = 8, 2
    if given.url:
        run(given.url, given)
    else:
        with bucket_of_moto() as url:
            run(url, given)


if __name__ == "__main__":
    main()

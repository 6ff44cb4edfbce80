"""Reading features back: one by one, and in whole batches as training takes them.

Theory. From page cache nothing is faster than `preadv` into memory that is used again and again: no allocation, no
copy but the kernel's. So that is the limit, measured in the same run, in turns with what is compared with it, on a
file of the same size in the same random order:

    get(out=)    one thread, into the caller's buffer, key looked up, checksum verified
    get()        the same into a fresh tensor, whose memory the kernel must first make
    delivery     batches as the trainer gets them: reader threads, announced one ahead; beside as many threads' preadv
    DataLoader   what users do instead: as many worker processes, each tensor sent through torch's queue; one
                 safetensors file for each feature

What a checksum costs is a limit of its own: `preadv` followed by xxh3-128 of the same bytes. Two more ways show what
was tried or must be avoided:

    beside       the checksum by a second thread, one piece behind the reading one
    misaligned   preadv into memory that starts 16 bytes behind the start of a page, as numpy's does: some processors
                 copy several times more slowly to a place 1 to 31 bytes further in its page than the source in its own
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset

import record
from vggt_cache.delivery import ReadAhead
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, ShardWriter, create_store
from vggt_cache.store.shards import PIECE_BYTES

BESIDE_BYTES = 1024 * 1024
"""Handed to the second thread at a time."""
GRID = {518: (28, 37), 644: (35, 46)}
"""(h, w) in patches of 640x480 frames."""


def read_and_hash(descriptor: int, view: memoryview, offset: int) -> None:
    """In pieces, so that the checksum finds the bytes in the processor's cache."""
    hasher = xxhash.xxh3_128()
    for at in range(0, len(view), PIECE_BYTES):
        piece = view[at : at + PIECE_BYTES]
        os.preadv(descriptor, [piece], offset + at)
        hasher.update(piece)
    hasher.digest()


class PerEntry(Dataset[torch.Tensor]):
    """One safetensors file for each feature, as many projects keep them."""

    def __init__(self, folder: Path, order: Sequence[int]) -> None:
        self._folder = folder
        self._order = order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, at: int) -> torch.Tensor:
        return load_file(self._folder / f"{self._order[at]}.safetensors")["feature"]


class Bench:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.spec = FeatureSpec(
            encoder=EncoderSpec(
                weights_digest="0" * 64, embed_dim=1024, depth=24, num_heads=16, img_size=518, patch_size=14,
                patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
            ),
            preprocessing=Preprocessing(image_size=arguments.image_size),
        )  # fmt: skip
        self.grid = GRID[arguments.image_size]
        self.shape = (*self.grid, 2048)
        self.keys = [os.urandom(16) for _ in range(arguments.features)]
        self.order = list(range(arguments.features))
        self.raw = folder / "raw"
        self.entries = folder / "entries"
        self._write(folder)
        self.cache = FeatureCache.open(folder / "cache", context="frame")
        self.reader = ReadAhead(self.cache, torch.device("cpu"), threads=arguments.threads)
        self.buffers = [
            torch.empty(self.shape, dtype=torch.bfloat16) for _ in range(2 * arguments.batch_size)
        ]

    @property
    def record_bytes(self) -> int:
        return self.buffers[0].nbytes

    def _write(self, folder: Path) -> None:
        self.entries.mkdir()
        feature = torch.randn(self.shape).bfloat16()
        store_dir = create_store(folder / "cache", self.spec)
        with open(self.raw, "wb") as raw:
            for first in range(0, len(self.keys), 64):
                with ShardWriter(store_dir, self.spec) as writer:
                    for number in range(first, min(first + 64, len(self.keys))):
                        feature[0, 0, 0] = number
                        writer.append(self.keys[number], feature)
                        raw.write(feature.view(torch.uint8).numpy().data)
                        save_file({"feature": feature}, self.entries / f"{number}.safetensors")
                    writer.commit()
        os.sync()

    # ------------------------------------------------------------ ways

    def pread(self, *, threads: int = 1, checksum: bool = False, ring: bool = False) -> None:
        """`ring`: into as many buffers as two batches need, more than a processor caches, not one a thread."""
        descriptor = os.open(self.raw, os.O_RDONLY)
        views = [memoryview(one.view(torch.uint8).numpy().reshape(-1)) for one in self.buffers]

        def read(part: int) -> None:
            for turn, number in enumerate(self.order[part::threads]):
                view = views[(turn * threads + part) % len(views) if ring else part]
                if checksum:
                    read_and_hash(descriptor, view, number * self.record_bytes)
                else:
                    os.preadv(descriptor, [view], number * self.record_bytes)

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, range(threads)))
        os.close(descriptor)

    def pread_misaligned(self) -> None:
        view = memoryview(mmap.mmap(-1, 16 + self.record_bytes))[16:]
        with open(self.raw, "rb", buffering=0) as file:
            for number in self.order:
                os.preadv(file.fileno(), [view], number * self.record_bytes)

    def checksum_beside(self) -> None:
        view = memoryview(self.buffers[0].view(torch.uint8).numpy().reshape(-1))
        pieces = [view[at : at + BESIDE_BYTES] for at in range(0, len(view), BESIDE_BYTES)]
        with open(self.raw, "rb", buffering=0) as file, ThreadPoolExecutor(1) as pool:
            for number in self.order:
                hasher, at = xxhash.xxh3_128(), number * self.record_bytes
                for piece in pieces:
                    os.preadv(file.fileno(), [piece], at)
                    added = pool.submit(hasher.update, piece)
                    at += len(piece)
                added.result()

    def get_into_buffer(self) -> None:
        for number in self.order:
            self.cache.get_by_key(self.keys[number], out=self.buffers[0])

    def get_fresh(self) -> None:
        for number in self.order:
            self.cache.get_by_key(self.keys[number])

    def delivery(self) -> None:
        """As the trainer takes them: the next batch is being read while this one is used."""
        reader = self.reader
        size = self.arguments.batch_size
        batches = [self.order[at : at + size] for at in range(0, len(self.order), size)]
        ahead = [reader.start(self.keys[number]) for number in batches[0]]
        for following in [*batches[1:], []]:
            reads, ahead = ahead, [reader.start(self.keys[number]) for number in following]
            reader.settle(reads)
            for read in reads:
                assert reader.wait(read) is not None
            for read in reads:
                reader.release(read)

    def dataloader(self) -> None:
        loader = DataLoader(
            PerEntry(self.entries, self.order), batch_size=self.arguments.batch_size,
            num_workers=self.arguments.threads, collate_fn=list,
        )  # fmt: skip
        for _ in loader:
            pass

    def run(self, ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
        """Middle of all rounds, bytes per second; the ways take turns, and each round has an order of its own."""
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            random.shuffle(self.order)
            for way, work in ways.items():
                began_s = time.perf_counter()
                work()
                speeds[way].append(self.record_bytes * len(self.order) / (time.perf_counter() - began_s))
        return {way: statistics.median(found) for way, found in speeds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_size", type=int, choices=GRID, default=644)
    parser.add_argument("--features", type=int, default=192)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--small", action="store_true", help="a few features, to see that it works")
    parser.add_argument(
        "--folder", help="where the files are written (default: the system's temporary directory)"
    )
    arguments = parser.parse_args()
    if arguments.small:
        arguments.features, arguments.rounds = 16, 1
    random.seed(0)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        bench = Bench(arguments, Path(folder))
        ways: dict[str, Callable[[], None]] = {
            "pread_1": bench.pread,
            "get_into_buffer": bench.get_into_buffer,
            "get_fresh": bench.get_fresh,
            "pread_1_checksum": lambda: bench.pread(checksum=True),
            "pread_1_checksum_beside": bench.checksum_beside,
            "pread_1_misaligned": bench.pread_misaligned,
            "pread_threads": lambda: bench.pread(threads=arguments.threads, ring=True),
            "pread_threads_checksum": lambda: bench.pread(
                threads=arguments.threads, checksum=True, ring=True
            ),
            "delivery": bench.delivery,
        }
        bench.run(ways, 1)
        speeds = bench.run(ways, arguments.rounds)
        speeds |= bench.run({"dataloader": bench.dataloader}, 3)
    record.write(
        "reading",
        "cpu",
        vars(arguments),
        {
            "record_bytes": bench.record_bytes,
            "bytes_per_s": speeds,
            "get_into_buffer_over_limit": speeds["get_into_buffer"] / speeds["pread_1"],
            "get_fresh_over_limit": speeds["get_fresh"] / speeds["pread_1"],
            "checksum_over_limit": speeds["pread_1_checksum"] / speeds["pread_1"],
            "get_into_buffer_over_limit_with_checksum": speeds["get_into_buffer"]
            / speeds["pread_1_checksum"],
            "delivery_over_limit": speeds["delivery"] / speeds["pread_threads"],
            "delivery_over_limit_with_checksum": speeds["delivery"] / speeds["pread_threads_checksum"],
            "delivery_over_dataloader": speeds["delivery"] / speeds["dataloader"],
        },
    )


if __name__ == "__main__":
    main()

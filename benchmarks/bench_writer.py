"""The writer of precompute alone: how many frames per second it takes off the encoder's hands and makes durable.

Theory. Beside an encoder of 200 frames per second and more the writer must never be what limits. What it cannot do
without is `write` of the bytes (the kernel's copy into its pages) and their checksum, xxh3-128: those two alone, one
after the other on one thread, into fresh files of a shard's size in the same folder, are the limit here. It is none
that cannot be passed: of the product's threads one writes, one commits, and what precompute's own thread does with a
batch (it asks which features are finite, and packs int8) may go on beside them, on a machine with more than one core.
On a GPU it asks the GPU; here it is a part of what is measured. fsync is a part of it too where the folder lies on a
disk; the default is memory, so that what is measured is the writer.

Batches of features that are in memory already are handed over as fast as they are taken. Time is counted from the first
to the return of `close`: then all is committed. One thread for each of torch's operations, as torchrun gives to each of
several processes. Writer and limit write in turns, the one that begins changes; of all rounds the best of each counts,
since on a machine that others use, too, only the best says what the code can do; the ratio is the middle of the
rounds', where both sides were disturbed alike.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import record
from bench_writing import CHANNELS, GRID, spec_of
from vggt_cache.doctor import mount_of
from vggt_cache.precompute.write import FeatureWriter, all_finite
from vggt_cache.store import ShardWriter, create_store
from vggt_cache.store.record import record_checksum
from vggt_cache.store.tensors import bytes_of
from vggt_cache.store.writer import DEFAULT_SHARD_BYTES

MEMORY = "/dev/shm"


class Bench:
    """One width: the same batch of bfloat16 features, under new keys, over and over."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, image_size: int) -> None:
        self.grid = GRID[image_size]
        self.spec = spec_of(image_size)
        shape = (arguments.batch_size, *self.grid, CHANNELS)
        self.batch = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        self.batches = max(1, arguments.features // arguments.batch_size)
        self.folder = folder
        self.store_dir = create_store(folder, self.spec)

    @property
    def features(self) -> int:
        return self.batches * len(self.batch)

    def ours(self) -> float:
        """Seconds until all is committed."""
        writer = FeatureWriter(
            new_shard=lambda: ShardWriter(self.store_dir, self.spec),
            feature_dtype=self.spec.feature_dtype,
            shard_bytes=DEFAULT_SHARD_BYTES,
            on_bad_feature=lambda label, reason: None,
        )
        labels = [""] * len(self.batch)
        began_s = time.perf_counter()
        for _ in range(self.batches):
            writer.put([secrets.token_bytes(16) for _ in labels], labels, self.batch)
        writer.close()
        ended_s = time.perf_counter()
        assert writer.committed == self.features
        return ended_s - began_s

    def limit(self) -> float:
        """Seconds for the checksum and `write` of the same features."""
        key, in_shard = bytes(16), DEFAULT_SHARD_BYTES // self.batch[0].nbytes + 1
        began_s = time.perf_counter()
        for start in range(0, self.features, in_shard):
            with open(self.folder / f"raw-{start}", "wb", buffering=0) as file:
                for number in range(start, min(start + in_shard, self.features)):
                    data = bytes_of(self.batch[number % len(self.batch)])
                    record_checksum(self.spec, key, *self.grid, data)
                    assert file.write(data) == len(data)
        return time.perf_counter() - began_s

    def asking(self) -> float:
        """Seconds for asking which features are finite, alone: what the encoder's own thread does."""
        began_s = time.perf_counter()
        for _ in range(self.batches):
            all_finite(self.batch).tolist()
        return time.perf_counter() - began_s

    def run(self, rounds: int) -> dict[str, Any]:
        ways = {"ours": self.ours, "limit": self.limit}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        asking = []
        for turn in range(rounds + 1):
            for way in sorted(ways, reverse=turn % 2 == 1):
                taken_s = ways[way]()
                self._clear()
                if turn:  # the first is a warm-up
                    seconds[way].append(taken_s)
            asking.append(self.asking())
        ratios = [limit / ours for limit, ours in zip(seconds["limit"], seconds["ours"], strict=True)]
        return {
            "feature_bytes": self.batch[0].nbytes,
            "frames_per_s": self.features / min(seconds["ours"]),
            "frames_per_s_middle": self.features / statistics.median(seconds["ours"]),
            "limit_frames_per_s": self.features / min(seconds["limit"]),
            "over_limit": statistics.median(ratios),
            "over_limit_lowest": min(ratios),
            "over_limit_highest": max(ratios),
            "asking_s_a_feature": min(asking) / self.features,
        }

    def _clear(self) -> None:
        """Remove what was written, and wait until the disk has nothing more to do for it."""
        for path in (*self.folder.glob("raw-*"), *(self.store_dir / "shards").iterdir()):
            path.unlink()
        os.sync()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", help=f"where the shards are written (default: {MEMORY}, which is memory)")
    parser.add_argument("--image_size", type=int, nargs="+", choices=GRID, default=list(GRID))
    parser.add_argument("--features", type=int, default=256, help="in a round")
    parser.add_argument("--batch_size", type=int, default=8, help="features that are handed over together")
    parser.add_argument("--rounds", type=int, default=9, help="rounds, for each width")
    parser.add_argument("--small", action="store_true", help="a few features, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.features, arguments.rounds = 24, 2
    chosen = Path(arguments.dir or MEMORY)
    if not chosen.is_dir():
        parser.error(f"there is no directory {chosen}: give one that exists with --dir")
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=chosen) as folder:
        kind = mount_of(Path(folder))[0]
        for size in arguments.image_size:
            figures[f"width_{size}"] = one = Bench(arguments, Path(folder) / str(size), size).run(
                arguments.rounds
            )
            print(
                f"{size} wide: {one['frames_per_s']:.0f} frames/s; write and checksum alone "
                f"{one['limit_frames_per_s']:.0f}; {one['over_limit']:.2f} of them"
            )
    configuration = vars(arguments) | {"file_system": kind, "threads": 1}
    del configuration["dir"]  # a path of one machine tells nobody anything
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("writer", "cpu", configuration, figures)


if __name__ == "__main__":
    main()

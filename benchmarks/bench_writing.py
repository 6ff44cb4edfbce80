"""Writing shards: checksums, header, link and durable folder, beside the bare writing of the same bytes.

Theory. A shard must pass through `write` and `fsync`, so its yardstick is those two alone: `os.write` of the
very same bytes, record by record, into a fresh file of the same size in the same folder, then `fsync` and
`close`. That promises nothing about a crash of the writer, checks nothing, and leaves no name that a reader
may trust. The product adds work (xxh3-128 of every record, the header, the lock, the link to the final name,
the fsync of the folder), and takes some away: it asks the disk to begin with what is already appended, so
that the disk works beside the copying and the checksums and not only in `fsync`. Hence a ratio can be above
1; `raw_early` is the bare writing with the same request, which nothing is faster than. Each way writes a whole
shard in turns, the one that begins changes, and the ratio is the middle of the rounds. The files of a round
are removed, and the disk is left to settle, before the next.

Where the time goes is seen from the store's seam to the operating system, a `FileSystem` that is given to the
writer and looks at the clock around each call; what is left is the product's own: the checksum (which is also
timed alone, on the same bytes), the codec where one packs, the header and Python. `write` is the kernel's
copy into its page cache; `fsync_file` the disk; `names` are creating, closing, listing, linking and
unlinking.

With `lossless` the limit writes the packed bytes, which are already there; so that ratio is a ratio of
packing to the disk, and what `packing` takes alone, on one core, says how much of it is the codec's.

On a file system in memory there is no disk to wait for, so the ratio there says what is added to the copy
alone. That is not the goal's case: the file system is part of the configuration that is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

import record
from vggt_cache.codec import NONE, codec_for
from vggt_cache.doctor import mount_of
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FileSystem, ShardWriter, create_store
from vggt_cache.store.filesystem import OPERATING_SYSTEM
from vggt_cache.store.record import record_checksum
from vggt_cache.store.tensors import bytes_of

GRID = {518: (28, 37), 644: (35, 46)}
"""(h, w) in patches of 640x480 frames."""
CHANNELS = 2048
T = TypeVar("T")


def spec_of(image_size: int) -> FeatureSpec:
    """Of the 1B encoder's features, in bfloat16."""
    encoder = EncoderSpec(
        weights_digest="0" * 64, embed_dim=CHANNELS // 2, depth=24, num_heads=16, img_size=518,
        patch_size=14, patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
    )  # fmt: skip
    return FeatureSpec(encoder=encoder, preprocessing=Preprocessing(image_size=image_size))


class TimedFileSystem(FileSystem):
    """The operating system's calls that a writer makes, and how long each kind took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def _timed(self, what: str, call: Callable[[], T]) -> T:
        began_s = time.perf_counter()
        try:
            return call()
        finally:
            self.seconds[what] += time.perf_counter() - began_s

    def pwrite(self, fd: int, data: bytes | bytearray | memoryview, offset: int) -> int:
        return self._timed("write", lambda: os.pwrite(fd, data, offset))

    def begin_write_back(self, fd: int, offset: int, length: int) -> None:
        self._timed("write", lambda: FileSystem.begin_write_back(self, fd, offset, length))

    def fsync(self, fd: int) -> None:
        self._timed("fsync_file", lambda: os.fsync(fd))

    def fsync_directory(self, dir_fd: int) -> None:
        self._timed("fsync_folder", lambda: os.fsync(dir_fd))

    def close(self, fd: int) -> None:
        self._timed("names", lambda: os.close(fd))

    def create_file(self, name: str, *, dir_fd: int) -> int:
        return self._timed("names", lambda: FileSystem.create_file(self, name, dir_fd=dir_fd))

    def link(self, source: str, target: str, *, dir_fd: int) -> None:
        self._timed("names", lambda: FileSystem.link(self, source, target, dir_fd=dir_fd))

    def unlink(self, name: str, *, dir_fd: int) -> None:
        self._timed("names", lambda: FileSystem.unlink(self, name, dir_fd=dir_fd))

    def list_names(self, dir_fd: int) -> list[str]:
        return self._timed("names", lambda: FileSystem.list_names(self, dir_fd))


class Bench:
    """One codec. `pieces` are what lies in a shard: its header, then each record."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, codec: str) -> None:
        self.codec = codec
        self.grid = GRID[arguments.image_size]
        self.spec = spec_of(arguments.image_size)
        generator = torch.Generator().manual_seed(0)
        self.features = [
            torch.randn((*self.grid, CHANNELS), generator=generator).bfloat16()
            for _ in range(arguments.features)
        ]
        self.keys = [secrets.token_bytes(16) for _ in self.features]
        self.store_dir = create_store(folder / codec, self.spec)
        self.raw_path = folder / "raw"
        self.pieces = self._pieces()

    def _pieces(self) -> list[memoryview]:
        """A shard as the product writes it, cut where its records begin."""
        name = self._write_shard(FileSystem())
        data = memoryview((self.store_dir / "shards" / name).read_bytes())
        self._clear()
        start = 8 + int.from_bytes(data[:8], "little")
        if self.codec == NONE:  # from the very memory that the product writes from
            return [data[:start], *map(bytes_of, self.features)]
        entries = json.loads(bytes(data[8:start]))
        spans = [entries[key.hex()]["data_offsets"] for key in self.keys]
        return [data[:start], *(data[start + begin : start + end] for begin, end in spans)]

    def _write_shard(self, fs: FileSystem) -> str:
        with ShardWriter(self.store_dir, self.spec, codec=self.codec, fs=fs) as writer:
            for key, feature in zip(self.keys, self.features, strict=True):
                writer.append(key, feature)
            return writer.commit()

    def _clear(self) -> None:
        """Remove what was written, and wait until the disk has nothing more to do for it."""
        for path in (self.store_dir / "shards").iterdir():
            path.unlink()
        self.raw_path.unlink(missing_ok=True)
        os.sync()

    # ------------------------------------------------------------ ways

    def ours(self) -> tuple[float, dict[str, float]]:
        fs = TimedFileSystem()
        began_s = time.perf_counter()
        self._write_shard(fs)
        seconds = time.perf_counter() - began_s
        return seconds, {**fs.seconds, "own": seconds - sum(fs.seconds.values())}

    def raw(self, *, early: bool = False) -> tuple[float, dict[str, float]]:
        began_s = time.perf_counter()
        fd = os.open(self.raw_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        written = 0
        for piece in self.pieces:
            rest = piece
            while rest:
                rest = rest[os.write(fd, rest) :]
            if early:
                OPERATING_SYSTEM.begin_write_back(fd, written, len(piece))
            written += len(piece)
        written_s = time.perf_counter()
        os.fsync(fd)
        os.close(fd)
        ended_s = time.perf_counter()
        return ended_s - began_s, {"write": written_s - began_s, "fsync_file": ended_s - written_s}

    def checksums(self) -> float:
        """Seconds for the checksums of one shard, alone."""
        stored = self.pieces[1:]
        began_s = time.perf_counter()
        for key, payload in zip(self.keys, stored, strict=True):
            record_checksum(self.spec, key, *self.grid, payload, self.codec)
        return time.perf_counter() - began_s

    def packing(self) -> float:
        """Seconds for the codec, alone; 0 where none packs."""
        if self.codec == NONE:
            return 0.0
        codec = codec_for(self.codec)
        began_s = time.perf_counter()
        for feature in self.features:
            codec.encode(bytes_of(feature), self.grid[0] * self.grid[1], CHANNELS)
        return time.perf_counter() - began_s

    def run(self, rounds: int) -> dict[str, Any]:
        ways = {"ours": self.ours, "raw": self.raw, "raw_early": partial(self.raw, early=True)}
        seconds: dict[str, list[float]] = defaultdict(list)
        parts: dict[str, list[dict[str, float]]] = defaultdict(list)
        alone: dict[str, list[float]] = defaultdict(list)
        for turn in range(rounds + 1):
            pair = {}
            for way in sorted(ways, reverse=turn % 2 == 1):
                pair[way] = ways[way]()
                self._clear()
            if turn == 0:
                continue  # warm-up: memory, directory and the disk's own caches
            for way, (taken_s, split) in pair.items():
                seconds[way].append(taken_s)
                parts[way].append(split)
            alone["checksum"].append(self.checksums())
            alone["packing"].append(self.packing())
        ratios = _ratios(seconds["raw"], seconds["ours"])
        early = _ratios(seconds["raw_early"], seconds["ours"])
        size = sum(map(len, self.pieces))
        return {
            "shard_bytes": size,
            "feature_bytes": sum(feature.nbytes for feature in self.features),
            "bytes_per_s": {way: size / statistics.median(found) for way, found in seconds.items()},
            "over_limit": statistics.median(ratios),
            "over_limit_lowest": ratios[0],
            "over_limit_highest": ratios[-1],
            "over_raw_early": statistics.median(early),
            "parts_s": {way: _medians(found) for way, found in parts.items()},
            "alone_s": {what: statistics.median(found) for what, found in alone.items()},
        }


def _ratios(bare: list[float], ours: list[float]) -> list[float]:
    return sorted(one / other for one, other in zip(bare, ours, strict=True))


def _medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(one[what] for one in found) for what in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", help="where the shards are written (default: the system's temporary directory)"
    )
    parser.add_argument("--image_size", type=int, choices=GRID, default=644)
    parser.add_argument(
        "--features", type=int, default=41, help="in a shard; 41 of 6.6 MB make precompute's 256 MiB"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds, for each codec")
    parser.add_argument("--codec", nargs="+", choices=[NONE, "lossless"], default=[NONE, "lossless"])
    parser.add_argument("--small", action="store_true", help="a few small shards, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.image_size, arguments.features, arguments.rounds = 518, 6, 3
    chosen = Path(arguments.dir or tempfile.gettempdir())
    if not chosen.is_dir():
        parser.error(f"there is no directory {chosen}: give one that exists with --dir")
    if arguments.dir is None and mount_of(chosen)[0] == "tmpfs":
        parser.error(f"{chosen} lies in memory, and the goal is about a disk: name a directory with --dir")
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=chosen) as folder:
        kind = mount_of(Path(folder))[0]
        for codec in arguments.codec:
            figures[codec] = Bench(arguments, Path(folder), codec).run(arguments.rounds)
    configuration = vars(arguments) | {"file_system": kind}
    del configuration["dir"]  # a path of one machine tells nobody anything
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("writing", "cpu", configuration, figures)


if __name__ == "__main__":
    main()

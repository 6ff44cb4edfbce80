"""Reading features for the first time: nothing in page cache, from disks and mounts that are slow.

Theory. A cold device gives what it can, and a reader gets no more of it than long reads one after the other, by the
same number of threads, of as many bytes: the limit, measured in the same process. Delivery is what the training loop
gets: features in random order, in batches announced one ahead, checksums verified. It loses where nothing is asked of
the device for a moment, where the device waits for small requests, and where the kernel reads ahead beyond a record:
of all features a quarter is wanted each time, so that what was fetched of its neighbours is lost, as it is in a cache
that is larger than memory (`fetched_over_wanted`: bytes from the device over bytes wanted). The devices:

    throttled   ext4 in memory behind a loop device, in a control group of version 1 that limits what is read from it
                to --limits_mb_per_s: exact, and faster or slower than the disk at hand; needs root
    latency     FUSE: each request waits --latency_s, bytes pass at 1 GB/s; pages kept and read ahead as for NFS
    direct      the same with direct_io: nothing is read ahead, so that requests are as large as the reader's pieces
    disk        the disk under --folder, as it is

Delivery reads through the page cache (`delivery_<threads>`) and past it with O_DIRECT (`past_<threads>`); beside the
speed of each stand the processor's seconds for a GB (10^9 bytes), of which the checksum alone, over bytes that lie in
memory already, takes `checksum_s_per_gb`.

What a machine cannot make is named under `unavailable`. Beside delivery by 1 to 8 threads (the product has 2) stand
plain reads in such an order with a checksum, by 2 threads, in small pieces (256 KiB) and in the product's: as they are;
with the kernel told not to read ahead (`random`); and then asked for the record's next 2 MiB, or the next piece, before
each read (`window`).

The loop has steps of a fixed length, 1.25 times what the device needs for a batch. With features announced one step
ahead the reading is hidden behind the step before, and a step takes 1.0 of its length; with features asked for when
they are needed it is added.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

import record
from bench_reading import GRID
from cold_reads import PRIMER, WANTED_SHARE, Device, Plan, measure
from slow_disk import Unavailable, memory_disk, throttle
from slow_mount import Wire, slow_mount
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import ShardWriter, create_store

FEATURES_PER_SHARD = 41
"""What makes precompute's 256 MiB."""
PRIMER_BYTES = 128 * 2**20
WIRE_BYTES_PER_S = 1e9


def write_store(folder: Path, arguments: argparse.Namespace) -> None:
    """A cache whose keys are the numbers of its features; the same bytes in one file for the limit; the primer."""
    spec = FeatureSpec(
        encoder=EncoderSpec(
            weights_digest="0" * 64, embed_dim=1024, depth=24, num_heads=16, img_size=518, patch_size=14,
            patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
        ),
        preprocessing=Preprocessing(image_size=arguments.image_size),
    )  # fmt: skip
    feature = torch.randn((*GRID[arguments.image_size], spec.encoder.channels)).bfloat16()
    store_dir = create_store(folder / "cache", spec)
    with open(folder / "raw", "wb") as raw:
        for first in range(0, arguments.features, FEATURES_PER_SHARD):
            with ShardWriter(store_dir, spec) as writer:
                for number in range(first, min(first + FEATURES_PER_SHARD, arguments.features)):
                    feature[0, 0, 0] = number
                    writer.append(number.to_bytes(16, "big"), feature)
                    raw.write(feature.view(torch.uint8).numpy().data)
                writer.commit()
    (folder / PRIMER).write_bytes(bytes(PRIMER_BYTES))
    os.sync()


# ---------------------------------------------------------------- devices


@contextmanager
def behind_a_wire(store: Path, folder: Path, latency_s: float, cached: bool) -> Iterator[Device]:
    wire = Wire(bytes_per_s=WIRE_BYTES_PER_S, latency_s=latency_s, cached=cached, counter=folder / "counter")
    mount = folder / "mount"
    mount.mkdir(exist_ok=True)
    with slow_mount(store, mount, wire):
        yield Device(folder=mount, wire=wire)


@contextmanager
def throttled(disk: Path, megabytes_per_s: int) -> Iterator[Device]:
    with throttle(disk, megabytes_per_s * 10**6) as group:
        yield Device(folder=disk, group=group)


@contextmanager
def as_it_is(store: Path) -> Iterator[Device]:
    yield Device(folder=store)


def attempt(making: AbstractContextManager[Device], plan: Plan) -> dict[str, Any]:
    """Figures of a device, or why there is none."""
    try:
        with making as device, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, device, plan).result()
    except Unavailable as error:
        return {"unavailable": str(error)}


def all_devices(
    folder: Path, arguments: argparse.Namespace, plan: Plan
) -> Iterator[tuple[str, dict[str, Any]]]:
    store = folder / "store"
    store.mkdir()
    write_store(store, arguments)
    # First those that need the store's files in page cache.
    yield "latency", attempt(behind_a_wire(store, folder, arguments.latency_s, True), plan)
    yield "direct", attempt(behind_a_wire(store, folder, arguments.latency_s, False), plan)
    yield "disk", attempt(as_it_is(store), plan)
    size_bytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    try:
        with memory_disk(int(1.1 * size_bytes) + 64 * 2**20) as disk:
            write_store(disk, arguments)
            for limit in arguments.limits_mb_per_s:
                yield f"throttled_{limit}", attempt(throttled(disk, limit), plan)
    except Unavailable as error:
        yield "throttled", {"unavailable": str(error)}


# ---------------------------------------------------------------- all of it


def table(devices: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "device          MB/s   delivery  of device   fetched   past the cache  CPU s/GB  step ahead / when needed"
    for name, one in devices.items():
        if "unavailable" in one:
            yield f"{name:14} {one['unavailable']}"
            continue
        speeds, loop = one["bytes_per_s"], one["loop"]
        yield (
            f"{name:14} {speeds['sequential'] / 1e6:6.0f} {speeds['delivery_2'] / 1e6:9.0f} "
            f"{one['delivery_over_device']:9.2f} {one['fetched_over_wanted']['delivery_2']:10.2f} "
            f"{speeds['past_2'] / 1e6:15.0f} {one['cpu_s_per_gb']['delivery_2']:.2f} -> "
            f"{one['cpu_s_per_gb']['past_2']:.2f} "
            f"{loop['ahead_over_step']:9.2f} / {loop['when_needed_over_step']:.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--image_size", type=int, choices=GRID, default=644)
    parser.add_argument("--features", type=int, default=256, help="stored; a quarter of them is read at most")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--limits_mb_per_s", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--latency_s", type=float, default=0.005)
    parser.add_argument("--seconds", type=float, default=3.0, help="of one pass, about")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", help="on the disk to measure (default: the temporary directory)")
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.image_size, arguments.features, arguments.batch_size = 518, 32, 2
        arguments.seconds, arguments.rounds = 0.5, 1
    if arguments.features < 2 * WANTED_SHARE * arguments.batch_size:
        parser.error(
            f"--features {arguments.features} are too few for two batches of {arguments.batch_size}, of which one in "
            f"{WANTED_SHARE} features is read: give {2 * WANTED_SHARE * arguments.batch_size} or more"
        )
    random.seed(0)
    plan = Plan(
        grid=GRID[arguments.image_size],
        batch_size=arguments.batch_size,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        devices = dict(all_devices(Path(folder), arguments, plan))
    print("\n".join(table(devices)))
    configuration = vars(arguments)
    del configuration["folder"]  # a path of one machine tells nobody anything
    if arguments.no_result:
        print(json.dumps(devices))
    else:
        record.write("cold", "cpu", configuration, devices)


if __name__ == "__main__":
    main()

"""Opening a cache of millions of records, finding one of them, and making the index anew when it is lost.

Theory. The index is read whole and checked once, so opening should cost what it takes to copy its 56 bytes a
record out of the page cache into fresh memory, to hash them and to find where the buckets of keys begin; a
lookup then touches memory only, whatever the number of records. The names in the head are compared with those in
the folder, so listing and sorting the folder is a limit of opening too. Beside each lookup stand, on the same keys
in the same order:

    searchsorted   numpy's binary search in the sorted first halves of the keys, mapped from a file: nothing
                   checked, nothing told but the place
    dict           Python's dictionary with every key in memory: the fastest lookup, and what it takes to have
                   it
    headers        beside the rebuild: every header through open, read and json.loads, nothing looked at

What is real and what is not. Nobody wants to write 10 million features for this. The index's bytes are made
by the product's own `IndexFile`, and of the records all but a few thousand exist as rows only: random keys,
checksums that belong to nothing, in shards of 256 that are empty files with valid names. A reader opens no
shard before it reads a record of it, so opening, listing and lookups (`key in cache`) do all that they would
do in a full store. Whole `get`s are of real records of 4 KiB, written through the ShardWriter into a few
shards, all of which stay open; they show what the index adds to a get, not the cost of opening a shard or
reading a large feature. The shards of the rebuild have complete, valid headers of 256 records, made by the
product, and a hole where their features would be: a rebuild reads headers only.

Each measurement is a process of its own, with every module loaded before the clock is started, because the
import of torch is not the index's. Memory is what is private to the process (Private_Clean + Private_Dirty of
smaps_rollup), as a difference: other readers of a node share the page cache, and private memory is what each
of them pays. Page cache warm: all files were written moments before, so this is processor time, not the
disk's.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import secrets
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import record
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.format import build_header, reserved_header_bytes
from vggt_cache.store.index import IndexFile
from vggt_cache.store.inventory import take_inventory
from vggt_cache.store.record import ROW_DTYPE, Record, RecordTable, join_rows, payload_bytes, sort_rows
from vggt_cache.store.shards import ShardFolder

RECORDS_PER_SHARD = 256
"""What precompute's shards hold at most."""
REAL_SHARDS = 16
LOOKUPS = 20_000
BATCHES = 5
"""Of lookups, each timed as a whole; the middle counts."""
MAPPED, KEYS, SAMPLE, REAL = "first_halves", "keys", "sample", "real"
T = TypeVar("T")

SPEC = FeatureSpec(
    encoder=EncoderSpec(
        weights_digest="0" * 64, embed_dim=1024, depth=24, num_heads=16, img_size=518, patch_size=14,
        patch_embed="dinov2_vitl14_reg", layer=22, compute_dtype="bfloat16",
    ),
    preprocessing=Preprocessing(image_size=518),
)  # fmt: skip
RECORD_BYTES = payload_bytes(SPEC, 1, 1)


def in_fresh_process(work: Callable[..., T], *arguments: object) -> T:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(work, *arguments).result()


def private_bytes() -> int:
    """Memory that no other process shares."""
    gc.collect()
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Private_C", "Private_D")))


def resident_bytes(field: str) -> int:
    """`VmRSS`: resident now; `VmHWM`: at most since it was forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"this system does not tell {field}")


# ---------------------------------------------------------------- stores


def make_store(folder: Path, count: int) -> None:
    """A store of `count` records, most of which are rows only, and files of keys to ask for."""
    store_dir = create_store(folder / "cache", SPEC)
    _write_real_shards(store_dir, min(REAL_SHARDS, max(1, count // (4 * RECORDS_PER_SHARD))))
    shard_folder = ShardFolder(str(store_dir), SPEC, fs=FileSystem())
    real = take_inventory(shard_folder)
    shard_folder.close()
    rows = _simulated_rows(count - len(real.rows))
    shards = int(rows["shard"][-1]) + 1
    # Their time is that of 1970, so that they stand in front of the real ones.
    names = [f"{number:012x}-{secrets.token_hex(8)}.safetensors" for number in range(shards)]
    for name in names:
        (store_dir / "shards" / name).touch()
    real.rows["shard"] += shards
    names += [shard.name for shard in real.shards]
    table = RecordTable(names, sort_rows(join_rows([rows, real.rows])))
    IndexFile(str(store_dir), SPEC.fingerprint, FileSystem()).save(table)

    keys = table.rows[["high", "low"]]
    np.ascontiguousarray(keys["high"]).astype("<u8").tofile(folder / MAPPED)
    _packed(keys).tofile(folder / KEYS)
    _packed(np.random.default_rng(1).choice(rows, LOOKUPS)).tofile(folder / SAMPLE)
    _packed(np.random.default_rng(2).permutation(real.rows)).tofile(folder / REAL)
    os.sync()


def _packed(rows: np.ndarray) -> np.ndarray:
    """The keys of rows, 16 bytes each."""
    return np.stack([rows["high"], rows["low"]], axis=1).astype(">u8")


def _write_real_shards(store_dir: Path, shards: int) -> None:
    feature = torch.zeros((1, 1, SPEC.encoder.channels), dtype=torch.bfloat16)
    for _ in range(shards):
        with ShardWriter(store_dir, SPEC) as writer:
            for _ in range(RECORDS_PER_SHARD):
                writer.append(secrets.token_bytes(16), feature)
            writer.commit()


def _simulated_rows(count: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    number = np.arange(count)
    rows = np.zeros(count, ROW_DTYPE)
    rows["high"] = generator.integers(0, 2**64, count, np.uint64)
    rows["low"] = generator.integers(0, 2**64, count, np.uint64)
    rows["shard"] = number // RECORDS_PER_SHARD
    rows["offset"] = 65536 + number % RECORDS_PER_SHARD * RECORD_BYTES
    rows["h"] = rows["w"] = 1
    return rows


def make_headers(folder: Path, shards: int) -> None:
    """A store without an index, whose shards are headers with a hole behind them."""
    store_dir = create_store(folder / "cache", SPEC)
    start = reserved_header_bytes(SPEC, RECORDS_PER_SHARD)
    for number in range(shards):
        records = [
            Record(secrets.token_bytes(16), start + at * RECORD_BYTES, 1, 1, secrets.token_bytes(16))
            for at in range(RECORDS_PER_SHARD)
        ]
        path = store_dir / "shards" / f"{number:012x}-{secrets.token_hex(8)}.safetensors"
        with open(path, "xb") as file:
            file.write(build_header(SPEC, records, start))
            file.truncate(start + RECORDS_PER_SHARD * RECORD_BYTES)
    os.sync()


# ---------------------------------------------------------------- measurements, each in a process of its own


def keys_in(path: Path) -> list[bytes]:
    data = path.read_bytes()
    return [data[at : at + 16] for at in range(0, len(data), 16)]


def seconds_each(ask: Callable[[bytes], object], keys: Sequence[bytes]) -> float:
    found = []
    for _ in range(BATCHES):
        began_s = time.perf_counter()
        for key in keys:
            ask(key)
        found.append((time.perf_counter() - began_s) / len(keys))
    return statistics.median(found)


def measure_store(folder: Path, count: int) -> dict[str, float]:
    before_bytes = private_bytes()
    began_s = time.perf_counter()
    cache = FeatureCache.open(folder / "cache", context="frame")
    open_s = time.perf_counter() - began_s
    opened_bytes = private_bytes() - before_bytes
    sample, real = keys_in(folder / SAMPLE), keys_in(folder / REAL)
    if len(cache) != count or not all(key in cache for key in sample):
        raise RuntimeError("the simulated store does not hold what was put in")
    began_s = time.perf_counter()
    names = sorted(os.listdir(cache.cache_dir + f"/{SPEC.short_name}/shards"))
    listing_s = time.perf_counter() - began_s
    out = torch.empty((1, 1, SPEC.encoder.channels), dtype=torch.bfloat16)
    return {
        "shards": len(names),
        "open_s": open_s,
        "listing_s": listing_s,
        "private_bytes": opened_bytes,
        "lookup_s": seconds_each(cache.__contains__, sample),
        "get_s": seconds_each(lambda key: cache.get_by_key(key, out=out), real),
    }


def measure_mapped(folder: Path) -> dict[str, float]:
    """numpy's own search. The keys are converted before: the search alone is the limit."""
    before_bytes = private_bytes()
    began_s = time.perf_counter()
    mapped = np.memmap(folder / MAPPED, "<u8", "r")
    open_s = time.perf_counter() - began_s
    halves = np.fromfile(folder / SAMPLE, ">u8")[::2].astype(np.uint64)
    found = []
    for _ in range(BATCHES):
        began_s = time.perf_counter()
        for half in halves:
            mapped.searchsorted(half)
        found.append((time.perf_counter() - began_s) / len(halves))
    return {
        "open_s": open_s,
        "lookup_s": statistics.median(found),
        "private_bytes": private_bytes() - before_bytes,
    }


def measure_dict(folder: Path) -> dict[str, float]:
    sample = keys_in(folder / SAMPLE)
    before_bytes = private_bytes()
    began_s = time.perf_counter()
    table = dict.fromkeys(keys_in(folder / KEYS))
    made_s = time.perf_counter() - began_s
    return {
        "open_s": made_s,
        "lookup_s": seconds_each(table.__contains__, sample),
        "private_bytes": private_bytes() - before_bytes,
    }


def measure_rebuild(folder: Path) -> dict[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before_bytes = resident_bytes("VmRSS")
    began_s = time.perf_counter()
    cache = FeatureCache.open(folder / "cache", context="frame")
    opened_s = time.perf_counter()
    if not cache.save_index():
        raise RuntimeError("the index could not be saved")
    saved_s = time.perf_counter()
    return {
        "records": len(cache),
        "open_without_index_s": opened_s - began_s,
        "save_s": saved_s - opened_s,
        "rebuild_s": saved_s - began_s,
        "peak_bytes": resident_bytes("VmHWM") - before_bytes,
    }


def measure_headers(folder: Path) -> dict[str, float]:
    began_s = time.perf_counter()
    for name in sorted(os.listdir(folder)):
        with open(folder / name, "rb", buffering=0) as file:
            json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {"read_and_parse_s": time.perf_counter() - began_s}


# ---------------------------------------------------------------- all of it


def run_size(folder: Path, count: int, processes: int) -> dict[str, Any]:
    in_fresh_process(make_store, folder, count)
    runs = [in_fresh_process(measure_store, folder, count) for _ in range(processes)]
    return {
        **{name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "open_slowest_s": max(run["open_s"] for run in runs),
        "searchsorted": in_fresh_process(measure_mapped, folder),
        "dict": in_fresh_process(measure_dict, folder),
    }


def run_rebuild(folder: Path, shards: int) -> dict[str, float]:
    in_fresh_process(make_headers, folder, shards)
    headers = in_fresh_process(measure_headers, folder / "cache" / SPEC.short_name / "shards")
    ours = in_fresh_process(measure_rebuild, folder)
    return {**ours, **headers, "over_limit": headers["read_and_parse_s"] / ours["rebuild_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", help="where the files are written (default: the system's temporary directory)"
    )
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--shards", type=int, default=10_000, help="whose headers the rebuild reads")
    parser.add_argument("--processes", type=int, default=3, help="for each size; the middle of them counts")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.records, arguments.shards, arguments.processes = [10_000, 100_000], 200, 1
    if arguments.dir is not None and not Path(arguments.dir).is_dir():
        parser.error(f"there is no directory {arguments.dir}: give one that exists with --dir")
    figures: dict[str, Any] = {"sizes": {}}
    folder = Path(tempfile.mkdtemp(dir=arguments.dir))
    try:
        for count in arguments.records:
            figures["sizes"][count] = run_size(folder / "store", count, arguments.processes)
            shutil.rmtree(folder / "store")  # room for the next
        figures["rebuild"] = run_rebuild(folder / "headers", arguments.shards)
    finally:
        shutil.rmtree(folder)
    sizes = list(figures["sizes"].values())
    figures["get_largest_over_smallest"] = sizes[-1]["get_s"] / sizes[0]["get_s"]
    configuration = vars(arguments)
    del configuration["dir"]  # a path of one machine tells nobody anything
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("index", "cpu", configuration, figures)


if __name__ == "__main__":
    main()

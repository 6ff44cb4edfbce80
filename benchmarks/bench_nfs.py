"""Reading and writing over NFS: what read-ahead, the page cache and early writing are worth where a server answers.

Theory. Records of 6 MiB are wanted, one of several in a file, and none is in memory. The store reads a record in
pieces, through the page cache, and the kernel reads ahead of it: over a network that keeps several requests under
way, and fetches bytes behind the record that nobody wants. POSIX_FADV_RANDOM takes the reading ahead away: fewer
bytes, and one request at a time for each piece, unless a whole record is asked for in one call. O_DIRECT fetches
what is asked for and nothing else, without a copy in memory. A file that is mapped is fetched page fault by page
fault. `fetched` counts what the client's kernel had from the server (/proc/self/mountstats) over what was wanted.

A shard that is written goes to the server when the kernel likes, in fsync at the latest. A hint after every 4 MiB lets
the sending begin while the next features are computed. Both are tried: the time of the writes alone, and with pauses
between them that take as long as the writing itself, where early writing could hide half of the time at best. `sent`
counts bytes sent over bytes written.

Server (nfs-ganesha) and client (User-Mode Linux) are those of the trials over NFS, on this machine: the network has no
latency to speak of, and a client computes slowly. So only ratios in one run mean something: each way over `pieces`, or
over `late`, of the same round; the middle of the rounds is given. It takes root and the packages that
`tests/trials/nfs/lab.py` names.

    python benchmarks/bench_nfs.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import record

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from trials.nfs.lab import FAST, require, run_apart
from trials.registry import Unavailable

Row = Mapping[str, Any]


def main() -> int:
    try:
        require()
    except Unavailable as reason:
        print(f"not on this machine: {reason}")
        return 0
    figures: dict[str, Any] = {}
    for seed, version in enumerate(("4.1", "3")):
        with tempfile.TemporaryDirectory(prefix="vggt-nfs-") as folder:
            rows = run_apart("transfers", str(seed), folder, FAST)
        figures[version] = {"reading": _reading(rows), "writing": _writing(rows)}
        _print(version, figures[version])
    record.write("nfs", "cpu", {"command": "python benchmarks/bench_nfs.py"}, figures)
    return 0


def _reading(rows: Iterable[Row]) -> dict[str, Any]:
    reads = [row for row in rows if "threads" in row]
    found: dict[str, Any] = {}
    for threads in sorted({row["threads"] for row in reads}):
        of = _by_way(row for row in reads if row["threads"] == threads)
        found[str(threads)] = {
            way: {
                "speed_over_pieces": _middle(
                    one["megabytes_per_s"] / plain["megabytes_per_s"]
                    for one, plain in zip(these, of["pieces"], strict=True)
                ),
                "megabytes_per_s": _middle(one["megabytes_per_s"] for one in these),
                "fetched": _middle(one["fetched"] for one in these),
            }
            for way, these in of.items()
        }
    return found


def _writing(rows: Iterable[Row]) -> dict[str, Any]:
    writes = [row for row in rows if "pauses" in row]
    found: dict[str, Any] = {}
    for pauses, name in ((0, "without_pauses"), (1, "with_pauses")):
        of = _by_way(row for row in writes if row["pauses"] == pauses)
        found[name] = {
            way: {
                "time_over_late": _middle(
                    one["seconds"] / late["seconds"] for one, late in zip(these, of["late"], strict=True)
                ),
                "fsync_share": _middle(one["fsync_s"] / one["seconds"] for one in these),
                "sent": _middle(one["sent"] for one in these),
            }
            for way, these in of.items()
        }
    return found


def _by_way(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["way"], []).append(row)
    return dict(sorted(found.items()))


def _middle(values: Iterable[float]) -> float:
    return round(statistics.median(values), 3)


def _print(version: str, figures: dict[str, Any]) -> None:
    for threads, ways in figures["reading"].items():
        for way, found in ways.items():
            print(f"NFS {version:4} {threads} threads {way:16} {found}")
    for pauses, ways in figures["writing"].items():
        for way, found in ways.items():
            print(f"NFS {version:4} {pauses:15} {way:16} {found}")


if __name__ == "__main__":
    sys.exit(main())

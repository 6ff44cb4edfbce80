"""The store beside other ways of keeping features on disk: speed, opening, what a kill and a flipped bit do.

Theory. From page cache nothing is faster than `preadv` into memory that is used again and again, and nothing is
written faster than by one `write` after the other and an fsync. Those are the limits, measured in turns with each
peer, in the same process and in the same random order; ratios are those of neighbours in time. Every peer has the
settings that its documentation recommends for records of this size (`benchmarks/peers/`, one file each).

    read         one feature by its number, in random order, one thread, into fresh memory of its own; beside `preadv`
                 by one thread. A peer that gives out views of a map must copy: a training step needs its own memory
    read_into    the same into the caller's memory, where the peer can do that
    delivery     whole batches to a loop that does nothing else: the peer's own loader or torch's DataLoader, with
                 persistent worker processes; ours with as many threads, read ahead; beside `preadv` by as many threads.
                 The first epoch starts the workers, is looked at feature by feature, and is not timed
    write        until everything is durable: most peers leave that to their user, so the timed part ends with an fsync
                 of every file and folder that is there, which costs next to nothing where the peer has done it (ours,
                 LMDB, TensorStore); beside `write` and one fsync of one file
    opening      a store of many entries of 4 KiB, opened by a fresh process that then reads one of them: seconds, and
                 memory that no other process shares, as in bench_index.py. WebDataset must read its first
    killed       SIGKILL at a random time of writing. `yes`: in every trial all that the peer had reported as kept could
                 be read, and nothing was served that was not what had been written under that number; `no`: in none
                 where something was reported or served; `nothing`: it reports nothing before all is written
    flipped      one bit of one value changed in the files: does a read fail or find nothing, or give other values

The page cache is warm: what was written is in memory, so this is processor time, and memory bandwidth, not the
disk's. A peer that is not installed, or fails, is a row that says so. What is not measured: a power loss, writing by
several processes, features of several shapes, reading over a network.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import record
from peers.catalogue import HOMES
from peers.processes import ChildError, in_child, prepare
from peers.row import SMALL, Settings, measure_row
from peers.speed import LIMIT_OF


def settings_of(arguments: argparse.Namespace) -> Settings:
    if arguments.small:
        return SMALL
    given = {name: getattr(arguments, name) for name in ("features", "entries", "rounds", "trials", "flips")}
    return Settings(**given)


def measure(names: list[str], folder: Path, settings: Settings) -> dict[str, Any]:
    """A row for each peer, each in a process of its own."""
    rows = {}
    for at, name in enumerate(names):
        print(f"{name} ({at + 1} of {len(names)})", flush=True)
        place = folder / f"row_{at}"
        place.mkdir()
        try:
            rows[name] = in_child("forkserver", None, measure_row, name, place, settings)
        except ChildError as error:
            rows[name] = {"missing": str(error)}
    return rows


def limits(rows: dict[str, Any]) -> dict[str, float]:
    """The limits' speeds, bytes per second: the middle of what stood beside the peers."""
    speeds = [row["speed"]["bytes_per_s"] for row in rows.values() if isinstance(row.get("speed"), dict)]
    return {way: statistics.median(one[way] for one in speeds) for way in set(LIMIT_OF.values()) if speeds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", help="where the files are written (default: the system's temporary directory)"
    )
    parser.add_argument("--features", type=int, default=Settings.features, help="of 6.6 MB each")
    parser.add_argument("--entries", type=int, default=Settings.entries, help="of 4 KiB each, to be opened")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--trials", type=int, default=Settings.trials, help="kills of each peer's writer")
    parser.add_argument("--flips", type=int, default=Settings.flips, help="bits flipped in each peer's files")
    parser.add_argument("--peers", nargs="+", choices=HOMES, default=list(HOMES), metavar="NAME")
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.dir is not None and not Path(arguments.dir).is_dir():
        parser.error(f"there is no directory {arguments.dir}: give one that exists with --dir")
    settings = settings_of(arguments)
    prepare()
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        rows = measure(arguments.peers, Path(folder), settings)
    h, w, channels = settings.shape
    figures = {"record_bytes": 2 * h * w * channels, "limits_bytes_per_s": limits(rows), "peers": rows}
    if arguments.no_result:
        print(json.dumps(figures, indent=1))
    else:
        record.write("peers", "cpu", dataclasses.asdict(settings) | {"small": arguments.small}, figures)


if __name__ == "__main__":
    main()

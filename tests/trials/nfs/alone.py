"""The trials, inside the name spaces that `run_apart` has made."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from store_kit import SPEC
from trials.nfs.lab import Lab
from vggt_cache.store import create_store

MILLION = 1_000_000
SHOWN_S = 65.0
"""A client may show a folder as old as its attribute cache allows (acdirmax, 60 s)."""


# ---------------------------------------------------------------- commits


def commits(lab: Lab, random: Random) -> dict[str, Any]:
    """Both clients commit and read; what was acknowledged is found by both, and never wrong."""
    create_store(lab.export / "cache", SPEC)
    writers = [client.start("write_for", seconds=20, first=(n + 1) * MILLION) for n, client in enumerate(lab.clients)]
    watchers = [client.start("watch_for", seconds=25) for client in lab.clients]
    for job in writers:
        job.result()
    acknowledged = [number for job in writers for numbers, _ in job.said for number in numbers]
    late = [await_all(client, acknowledged) for client in lab.clients]
    delays = [job.result() for job in watchers]
    return {"trials": sum(len(job.said) for job in writers), "late": late, "reads": [d["reads"] for d in delays],
       "acks": [job.said for job in writers], "seen": [d["seen"] for d in delays]}


def await_all(client: Any, numbers: list[int]) -> float:
    """Until a cache that is opened there has all of them; after how many seconds."""
    began_s = time.monotonic()
    while missing := client.call("find", numbers=numbers):
        assert time.monotonic() - began_s < SHOWN_S, f"{client.name} does not find {missing[:5]}"
        time.sleep(0.5)
    return time.monotonic() - began_s


def main() -> None:
    name, seed, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    lab = Lab(folder, "3" if seed % 2 else "4.1")
    print(json.dumps(globals()[name](lab, Random(seed))))


if __name__ == "__main__":
    main()

"""A training step with features from the cache, beside the same step computed live and with features at hand.

Theory. A step cannot be faster than with its features already in the device's memory (d): what a cache may cost is what
it adds to that. So every batch is stepped four times, one after the other, in one process, with the same model, the
same optimizer and the same tokens and pixels; only the way to the features differs:

    a  reference   the published way: the encoder frame by frame, sample by sample, nothing shared, inside the step
    b  live        this project's encoder on a miss: the frames of a list in one walk, only what the feature needs
    c  cached      read from disk (page cache) by reader threads, announced one step ahead, checksums verified
    d  resident    in memory before the step begins

The middle of all steps counts, and for c/d the middle of the pairs that were stepped one right after the other, so that
a disturbance of single steps has no part. `--size real`: Qwen2.5-VL-3B and
VGGT-1B in their published shapes with random weights, bfloat16, gradient checkpointing. `--size tiny`: for a CPU.

`--profile` says what a step from the cache is made of (`step_profile.py`), `--largest_batch` how many samples a step of
each way can hold on this GPU (`largest_batch.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

import record
from largest_batch import largest_batches
from step_profile import profile_cached_step
from stepper import WAYS, Stepper


def speeds(bench: Stepper, rounds: int, pairs: int) -> dict[str, Any]:
    """All four ways in turns, then more of the two that are compared."""
    bench.run(WAYS, len(bench.batches))  # each batch once: the first step of a shape is slower
    bench.source.take_counts()
    seconds = bench.run(WAYS, rounds)
    for way, times in bench.run(("cached", "resident"), pairs).items():
        seconds[way] += times
    ratios = [one / two for one, two in zip(seconds["cached"], seconds["resident"], strict=True)]
    middle = {way: statistics.median(times) for way, times in seconds.items()}
    counts = bench.source.take_counts()
    return {
        "seconds_per_step": middle,
        "cached_over_resident": statistics.median(ratios),
        "reference_over_cached": middle["reference"] / middle["cached"],
        "live_over_cached": middle["live"] / middle["cached"],
        "cache_wait_ms": 1e3 * counts.wait_s / counts.batches,
        "feature_bytes": bench.batches[0]["resident_features"][0].nbytes,
        "tokens": bench.batches[0]["input_ids"].shape[1],
        "seconds": {way: [round(one, 5) for one in times] for way, times in seconds.items()},
    }


def measure(bench: Stepper, arguments: argparse.Namespace) -> dict[str, Any]:
    figures = speeds(bench, arguments.rounds, arguments.pairs)
    figures["memory"] = {way: bench.memory(way) for way in WAYS} if bench.device.type == "cuda" else {}
    if arguments.profile:
        figures["profile"] = profile_cached_step(bench)
    if arguments.largest_batch:
        figures["largest_batch"] = largest_batches(bench, WAYS)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=("tiny", "real"), default="real" if on_gpu else "tiny")
    parser.add_argument("--image_size", type=int, default=644 if on_gpu else 280)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=8, help="different batches")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each of the four ways")
    parser.add_argument("--pairs", type=int, default=80, help="further pairs of a cached and a resident step")
    parser.add_argument("--profile", action="store_true", help="also what a step from the cache is made of")
    parser.add_argument("--largest_batch", action="store_true", help="also how many samples fit; needs a GPU")
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.size, arguments.image_size = "tiny", 112
        arguments.batches, arguments.rounds, arguments.pairs = 2, 2, 2
    if arguments.largest_batch and not arguments.device.startswith("cuda"):
        parser.error(
            f"--largest_batch looks for the end of a GPU's memory, and --device is {arguments.device}: run it on a "
            "machine with a GPU, or leave it out"
        )
    with tempfile.TemporaryDirectory() as folder:
        bench = Stepper(arguments, Path(folder))
        figures = measure(bench, arguments)
        bench.source.close()
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("step", arguments.device, vars(arguments), figures)


if __name__ == "__main__":
    main()

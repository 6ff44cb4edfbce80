"""The largest batch whose step fits into a GPU's memory, for each way to the features.

Doubled until memory is full, then the gap halved. A batch is one sample, repeated; the encoder takes each for a sample
of its own, so that nothing is shared between them. Two steps must fit: the optimizer's state comes with the first.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stepper import Stepper

MOST = 512


def largest_batches(bench: Stepper, ways: Sequence[str]) -> dict[str, int]:
    """0 where not even one sample fits; `MOST` where nothing larger was tried."""
    found = {}
    for way in ways:
        bench.encoder.to(bench.device if way in ("reference", "live") else "cpu")
        found[way] = largest(lambda size, way=way: fits(bench, way, size), MOST)
    bench.encoder.to(bench.device)
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest size from 0 to `most` that fits, if all smaller ones do. Asks for about 2 log2 of it."""
    good, size = 0, 1
    while size <= most and fits(size):
        good, size = size, 2 * size
    bad = min(size, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def fits(bench: Stepper, way: str, size: int) -> bool:
    try:
        batch = repeated(bench, size)
        for _ in range(2):
            bench.step(batch, lambda: bench.features(way, batch))
            bench.source.step_done()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        batch = {}
        bench.source.forget()
        bench.optimizer.zero_grad()
        bench.live = bench.new_live()  # it takes smaller batches for good once memory was full
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def repeated(bench: Stepper, size: int) -> dict[str, Any]:
    """A batch of the first sample, `size` times."""
    item = bench.items[0]
    request = item["feature_request"]
    items = []
    for copy in range(size):
        digests = tuple(copy.to_bytes(4, "big") + digest[4:] for digest in request.digests)
        items.append({**item, "feature_request": dataclasses.replace(request, digests=digests)})
    batch = bench.batch_of(items)
    feature = bench.batches[0]["resident_features"][0]
    batch["resident_features"] = [feature.clone() for _ in range(size)]
    return batch

"""A `CachedAggregator` call whose feature is found, beside what no cache can do without.

That is: the bytes of the feature from page cache into memory of the device (`preadv` into a new tensor; on a GPU into
pinned memory that is used again, and a copy), and a digest of the pixels, without which nobody knows which feature is
meant. They are measured in turns, so that a busy machine is busy for all. Prints a table, then one line of JSON.

    python benchmarks/bench_aggregator.py [--frames 8] [--width 518] [--height 392] [--channels 2048] [--calls 20]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import xxhash
from torch import nn

from vggt_cache import CachedAggregator
from vggt_cache.encoder import EncoderConfig, expected_shapes
from vggt_cache.pixel_cache import PixelCache

TOWERS = {384: ("dinov2_vits14_reg", 6), 768: ("dinov2_vitb14_reg", 12), 1024: ("dinov2_vitl14_reg", 16)}


class Weights(nn.Module):
    """Names and shapes of an aggregator, which is never called."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        for name, shape in expected_shapes(config).items():
            *path, last = name.split(".")
            home: nn.Module = self
            for part in path:
                if part not in home._modules:
                    home.add_module(part, nn.Module())
                home = home._modules[part]  # type: ignore[assignment]
            home.register_parameter(last, nn.Parameter(torch.zeros(shape), requires_grad=False))

    def forward(self, images: torch.Tensor) -> None:
        raise RuntimeError("the feature is not in the cache")


def measured(parts: dict[str, Callable[[], object]], calls: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(calls):
        for name, part in parts.items():
            began_s = time.perf_counter()
            part()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(values[calls // 4 :]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("frames", 8), ("width", 518), ("height", 392), ("channels", 2048), ("calls", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tower, heads = TOWERS[given.channels // 2]
    config = EncoderConfig(embed_dim=given.channels // 2, depth=2, num_heads=heads, patch_embed=tower)
    images = torch.randint(
        0, 256, (given.frames, 3, given.height, given.width), generator=torch.Generator().manual_seed(0)
    )
    images = (images.float() / 255).to(device)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        # On a CPU the module computes, and the cache keeps, float32.
        cached = CachedAggregator(Weights(config).to(device), folder, layers=-1, miss="error")
        spec = cached._asked.spec("joint", "float32", feature_dtype="float32")
        tokens = 5 + given.height // 14 * (given.width // 14)
        with_feature = PixelCache(folder, spec, fill=True)
        with_feature.put(with_feature.keys([images]), torch.rand((1, given.frames, tokens, given.channels)))
        with_feature.close()
        (shard,) = Path(folder).glob("joint-*/shards/*.safetensors")
        fd, size = os.open(shard, os.O_RDONLY), given.frames * tokens * given.channels * 4
        pinned = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        hashing = PixelCache(folder, spec)

        def copy() -> object:
            memory = pinned if device.type == "cuda" else torch.empty(size, dtype=torch.uint8)
            os.preadv(fd, [memory.numpy().data], 4096)
            return memory.to(device, non_blocking=True)

        def floor() -> object:
            return hashing.keys([images]), copy()

        def checked() -> object:
            feature: torch.Tensor = copy()  # type: ignore[assignment]
            return (
                hashing.keys([images]),
                xxhash.xxh3_128_digest((feature if device.type == "cpu" else pinned).numpy().data),
                feature,
            )

        parts = {
            "cached call": lambda: cached(images)[0][-1],
            "copy, checksum and digest": checked,
            "copy and digest": floor,
            "copy": copy,
        }
        seconds = measured(parts, given.calls)
        os.close(fd)
    ratio = seconds["cached call"] / seconds["copy and digest"]
    for name, value in seconds.items():
        print(f"{name:16} {value * 1e3:8.2f} ms")
    print(f"ratio            {ratio:8.3f}")
    print(
        json.dumps(
            {
                "benchmark": "aggregator",
                "device": str(device),
                **vars(given),
                "seconds": seconds,
                "ratio": ratio,
            }
        )
    )


if __name__ == "__main__":
    main()

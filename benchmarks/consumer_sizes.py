"""What a cache costs people who train on VGGT, and below which read speed it does not pay. Prints a table.

A feature has frames x tokens x layers x 2048 values of 2 bytes (bfloat16; int8 has half). Break-even is that over the
time that VGGT takes for the same frames on the same GPU: storage that gives less than this to each GPU makes training
slower than computing. VGGT's times are those of its README (one H100, flash attention 3): seconds by frames, in between
by a straight line. They are for frames of 518 pixels: larger ones take longer, smaller ones less.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

VGGT_S = {1: 0.04, 2: 0.05, 4: 0.07, 8: 0.11, 10: 0.14, 20: 0.31, 50: 1.04, 100: 3.12}
VALUES, BYTES = 2048, 2


class Consumer(NamedTuple):
    name: str
    frames: int
    grid: tuple[int, int]
    kept_frames: int
    layers: int
    extra_tokens: int
    samples: int
    """How many different frame lists an epoch has, where it is known; else 0."""
    encoder_s: float = 0.0
    """Of a sample, where it is not VGGT's joint call."""


CONSUMERS = (
    Consumer("VG-LLM", 8, (28, 37), 8, 1, 0, 63_000),
    Consumer("SpatialStack", 8, (28, 37), 8, 3, 1, 0),
    Consumer("GeoThinker", 32, (28, 37), 32, 1, 1, 0),
    Consumer("Spatial-MLLM", 16, (34, 46), 16, 1, 0, 1_201),
    Consumer("VLM-3R (VGGT)", 32, (27, 27), 32, 1, 1, 0),
    Consumer("3DRS", 32, (28, 37), 32, 1, 5, 1_513),
    Consumer(
        "3DRS, pooled 14x14",
        32,
        (14, 14),
        32,
        1,
        0,
        1_513,
        float(np.interp(32, [*VGGT_S], [*VGGT_S.values()])),
    ),
    Consumer("JanusVLN", 9, (35, 46), 1, 1, 0, 612_000),
    Consumer("VGGT-DP", 1, (10, 10), 1, 1, 5, 0),
    Consumer("Spatial-Forcing", 2, (37, 37), 2, 1, 0, 0),
    Consumer("GeometryForcing", 16, (37, 37), 16, 24, 5, 0),
)


def main() -> None:
    print(
        "| consumer | a sample, bfloat16 | int8 | an epoch, bfloat16 | break-even for a GPU, bfloat16 | int8 |"
    )
    print("|---|---|---|---|---|---|")
    for one in CONSUMERS:
        tokens = one.grid[0] * one.grid[1] + one.extra_tokens
        size = one.kept_frames * tokens * one.layers * VALUES * BYTES
        encoder_s = one.encoder_s or float(np.interp(one.frames, [*VGGT_S], [*VGGT_S.values()]))
        total = f"{size * one.samples / 1e9:,.0f} GB" if one.samples else "by your lists"
        speed = size / encoder_s / 1e6
        sizes = f"{size / 1e6:.1f} MB | {size / 2e6:.1f} MB"
        print(f"| {one.name} | {sizes} | {total} | {speed:.0f} MB/s | {speed / 2:.0f} MB/s |")


if __name__ == "__main__":
    main()

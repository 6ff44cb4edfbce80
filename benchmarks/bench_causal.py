"""Causal features of one episode: shared prefixes against the published way, frame by frame for every sample.

Theory. Step i of an episode uses the frames linspace(0, i, 9). The published model runs the encoder on every frame of
every sample: the patch tower and all pairs each time. Two exact savings are possible: the patch tower sees one image at
a time, so it is needed once per image; and lists that begin alike share the keys and values of that beginning, so the
pairs are needed once per distinct prefix. What these savings allow is the ratio of the FLOPs of both ways (formulas in
`bench_encoder.py`). The measured ratio can lie below it, because shared work also comes in batches, while the samples
of the published way come one by one.

Both ways use the same encoder and stop at the same layer, and run in the same process, one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
import time

import numpy as np
import torch

import record
from bench_encoder import pairs_flops, tower_flops
from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.encoder import Checkpoint, Encoder, FrameCache
from vggt_cache.encoder.causal import CausalStats, encode_lists
from vggt_cache.encoder.model import patch_grid
from vggt_cache.samples import history_indexes


def one_by_one(encoder: Encoder, frames: list[int], images: torch.Tensor) -> torch.Tensor:
    """The published way: nothing is kept from one sample to the next."""
    prefix: list[FrameCache] = []
    feature = None
    for frame in frames:
        pixels = images[frame][None]
        tokens = encoder.patch_tokens(pixels)
        feature, (cache,) = encoder.extend(
            tokens, patch_grid(pixels), [prefix], want_feature=[True], want_cache=[True]
        )
        assert cache is not None
        prefix.append(cache)
    assert feature is not None
    return feature[0]


def flops(encoder: Encoder, lists: list[list[int]], patches: int) -> tuple[int, int]:
    """Of the published way, and with everything shared."""
    tower = tower_flops(encoder.config, patches)
    prefixes = {tuple(frames[: depth + 1]) for frames in lists for depth in range(len(frames))}
    images = {frame for frames in lists for frame in frames}
    published = sum(
        tower + pairs_flops(encoder, patches, depth + 1) for frames in lists for depth in range(len(frames))
    )
    shared = tower * len(images) + sum(pairs_flops(encoder, patches, len(prefix)) for prefix in prefixes)
    return published, shared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--height", type=int, default=168)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--vggt_model_path", help="a checkpoint; default: the small one of the demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute_dtype", default="float32")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Checkpoint.open(arguments.vggt_model_path or str(write_checkpoint(folder)))
        encoder = checkpoint.load(device=arguments.device, compute_dtype=arguments.compute_dtype)
    random = np.random.default_rng(0)
    shape = (arguments.steps, arguments.height, arguments.width, 3)
    images = torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
    lists = [history_indexes(step) for step in range(arguments.steps)]
    encoder.frame_features(images[:1])  # the first call is slower

    stats = CausalStats()
    began_s = time.perf_counter()
    shared = dict(
        encode_lists(encoder, lists, images.__getitem__, batch_size=arguments.batch_size, stats=stats)
    )
    shared = {index: feature.cpu() for index, feature in shared.items()}
    shared_s = time.perf_counter() - began_s

    began_s = time.perf_counter()
    worst = 0.0
    for index, frames in enumerate(lists):
        feature = one_by_one(encoder, frames, images).cpu()
        worst = max(worst, float((feature - shared[index]).norm() / feature.norm()))
    published_s = time.perf_counter() - began_s

    passes = sum(map(len, lists))
    published_flops, shared_flops = flops(encoder, lists, arguments.height * arguments.width // 196)
    record.write(
        "causal",
        arguments.device,
        vars(arguments),
        {
            "samples": len(lists),
            "frame_passes_published": passes,
            "frame_passes_shared": stats.frame_passes,
            "tower_passes_published": passes,
            "tower_passes_shared": stats.tower_passes,
            "published_s": round(published_s, 3),
            "shared_s": round(shared_s, 3),
            "ratio": round(shared_s / published_s, 4),
            "ratio_of_flops": round(shared_flops / published_flops, 4),
            "largest_relative_difference": worst,
        },
    )


if __name__ == "__main__":
    main()

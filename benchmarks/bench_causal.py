"""Causal features of one episode: shared prefixes against the published way, frame by frame for every sample.

Theory. Step i of an episode uses the frames linspace(0, i, 9). The published model runs the encoder on every frame of
every sample: the patch tower and all pairs each time. Two exact savings are possible: the patch tower sees one image at
a time, so it is needed once per image; and lists that begin alike share the keys and values of that beginning, so the
pairs are needed once per distinct prefix. What these savings allow is the ratio of the FLOPs of both ways (formulas in
`bench_encoder.py`). The measured ratio can lie below it, because shared work also comes in batches, while the samples
of the published way come one by one.

Another limit is what the machine does in context `frame`, where batches are all that there is: causal features cannot
come faster than their FLOPs at that speed. `of_frame_efficiency` is the share of it that the shared way reaches: FLOP/s
over FLOP/s of single frames in batches of the same size, measured before and after.

Both ways use the same encoder and stop at the same layer, and run in the same process, one after the other. `--size 1b`
is VGGT-1B, with random weights.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch

import record
from bench_encoder import DTYPES, SIZES, pairs_flops, random_encoder, seconds, tower_flops
from profile_parts import synchronize
from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.encoder.causal import CausalStats, encode_lists
from vggt_cache.identity import PATCH_SIZE
from vggt_cache.samples import history_indexes


def one_by_one(encoder: Encoder, frames: list[int], images: torch.Tensor) -> torch.Tensor:
    """The published way: nothing is kept from one sample to the next."""
    grid = images.shape[1] // PATCH_SIZE, images.shape[2] // PATCH_SIZE
    history, feature = encoder.new_history(grid, rows=1, frames=len(frames)), None
    for place, frame in enumerate(frames):
        tokens = encoder.patch_tokens(images[frame][None])
        feature = encoder.extend(tokens, history, [0], place, want_feature=[True])
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


def frame_flop_per_s(encoder: Encoder, images: torch.Tensor, batch_size: int, at_least_s: float) -> float:
    """Of single frames in batches of this size."""
    batch = images[:batch_size].to(encoder.device)
    patches = images.shape[1] * images.shape[2] // 196
    one = tower_flops(encoder.config, patches) + pairs_flops(encoder, patches, 1)
    return len(batch) * one / seconds(lambda: encoder.frame_features(batch), encoder.device, at_least_s)


def shared_features(
    encoder: Encoder, lists: list[list[int]], images: torch.Tensor, batch_size: int
) -> tuple[dict[int, torch.Tensor], CausalStats, float]:
    """This project's way: features in host memory, passes, seconds."""
    stats = CausalStats()
    began_s = time.perf_counter()
    walk = encode_lists(encoder, lists, images.__getitem__, batch_size=batch_size, stats=stats)
    features = {index: feature.cpu() for index, feature in walk}
    return features, stats, time.perf_counter() - began_s


def published_s(
    encoder: Encoder, lists: list[list[int]], images: torch.Tensor, features: dict[int, torch.Tensor]
) -> tuple[float, float]:
    """Seconds of the published way, and its largest relative difference from `features`."""
    elapsed_s = worst = 0.0
    for index, frames in enumerate(lists):
        began_s = time.perf_counter()
        feature = one_by_one(encoder, frames, images).cpu()
        elapsed_s += time.perf_counter() - began_s
        worst = max(worst, float((feature - features[index]).norm() / feature.norm()))
    return elapsed_s, worst


def measure(encoder: Encoder, arguments: argparse.Namespace) -> dict[str, Any]:
    random = np.random.default_rng(0)
    shape = (arguments.steps, arguments.height, arguments.width, 3)
    images = torch.from_numpy(random.integers(0, 256, shape, dtype=np.uint8))
    lists = [history_indexes(step) for step in range(arguments.steps)]
    size = arguments.batch_size
    # A GPU may make a plan for each new shape: all of them, of both ways, are met before the clock runs.
    _, _, first_s = shared_features(encoder, lists, images, size)
    one_by_one(encoder, lists[-1], images)
    synchronize(encoder.device)

    frame_speeds = [frame_flop_per_s(encoder, images, size, arguments.seconds)]
    features, stats, shared_s = shared_features(encoder, lists, images, size)
    frame_speeds.append(frame_flop_per_s(encoder, images, size, arguments.seconds))
    one_by_one_s, worst = published_s(encoder, lists, images, features)

    passes = sum(map(len, lists))
    published_flops, shared_flops = flops(encoder, lists, arguments.height * arguments.width // 196)
    frame_speed = sum(frame_speeds) / 2
    return {
        "samples": len(lists),
        "frame_passes_published": passes,
        "frame_passes_shared": stats.frame_passes,
        "tower_passes_published": passes,
        "tower_passes_shared": stats.tower_passes,
        "published_s": round(one_by_one_s, 3),
        "shared_s": round(shared_s, 3),
        "shared_first_s": round(first_s, 3),
        "ratio": round(shared_s / one_by_one_s, 4),
        "times_as_fast": round(one_by_one_s / shared_s, 3),
        "ratio_of_flops": round(shared_flops / published_flops, 4),
        "features_per_s": len(lists) / shared_s,
        "frame_passes_per_s": stats.frame_passes / shared_s,
        "flop_per_s": shared_flops / shared_s,
        "flop_per_s_of_single_frames": frame_speed,
        "of_frame_efficiency": round(shared_flops / shared_s / frame_speed, 4),
        "largest_relative_difference": worst,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--height", type=int, default=392 if on_gpu else 168)
    parser.add_argument("--width", type=int, default=518 if on_gpu else 224)
    parser.add_argument("--batch_size", type=int, default=16 if on_gpu else 4)
    parser.add_argument("--size", choices=SIZES, default="1b" if on_gpu else "small")
    parser.add_argument("--vggt_model_path", help="a checkpoint; default: random weights of --size")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--compute_dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement of single frames")
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.steps, arguments.height, arguments.width, arguments.seconds = 12, 70, 98, 0.1

    if arguments.vggt_model_path:
        checkpoint = Checkpoint.open(arguments.vggt_model_path)
        encoder = checkpoint.load(device=arguments.device, compute_dtype=arguments.compute_dtype)
    else:
        encoder = random_encoder(SIZES[arguments.size], arguments.device, arguments.compute_dtype)
    figures = measure(encoder, arguments)
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("causal", arguments.device, vars(arguments), figures)


if __name__ == "__main__":
    main()

"""The encoder's speed as a share of the matrix peak of the same machine, and its parity across devices.

Theory. Nearly all arithmetic of the encoder is matrix products, so no implementation can be faster than
(FLOPs per frame) / (FLOP/s of the largest square matrix product that this device does in the same dtype). With one
multiply-add = 2, C channels, P patches, n = P + 5 tokens of a frame and m visible tokens:

    block(n, m)  = 24 n C^2 + 4 n m C
    patch tower  = its depth * block(n, n) + 1176 P C
    pair         = block(n, n) + block(n, n * frames seen)

The peak is measured first and last; the mean counts. Weights are random, in the real shapes: speed does not depend on
their values. `--size 1b` is VGGT-1B, `--size small` what the tests use (for a run on a CPU).

`--profile` says what is left beside the matrix products: shares of a batch's time by class of operation, and what no
operation fills (`profile_parts.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

import record
from profile_parts import operation_shares, synchronize
from vggt_cache.encoder import Encoder, EncoderConfig
from vggt_cache.encoder.causal import CausalStats, encode_lists
from vggt_cache.encoder.checkpoint import on_meta
from vggt_cache.samples import history_indexes

SIZES = {
    "1b": EncoderConfig(),
    "small": EncoderConfig(embed_dim=384, depth=4, num_heads=6, patch_embed="dinov2_vits14_reg"),
}
HEIGHT_OF_640x480 = {70: 56, 518: 392, 644: 490}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def block_flops(n: int, m: int, c: int) -> int:
    return 24 * n * c * c + 4 * n * m * c


def tower_flops(config: EncoderConfig, patches: int) -> int:
    n = patches + 5
    return config.vit.depth * block_flops(n, n, config.embed_dim) + 1176 * patches * config.embed_dim


def pairs_flops(encoder: Encoder, patches: int, frames_seen: int) -> int:
    n, c = patches + 5, encoder.config.embed_dim
    return (encoder.layer + 1) * (block_flops(n, n, c) + block_flops(n, n * frames_seen, c))


def seconds(work: Callable[[], object], device: torch.device, at_least_s: float) -> float:
    """Mean seconds of one call, over as many calls as fill `at_least_s`, after one to warm up."""
    work()
    synchronize(device)
    calls, began_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - began_s) < at_least_s or not calls:
        work()
        synchronize(device)
        calls += 1
        elapsed_s = time.perf_counter() - began_s
    return elapsed_s / calls


def matrix_peak(
    device: torch.device, dtype: torch.dtype, at_least_s: float, side: int | None = None
) -> float:
    """FLOP/s of a square matrix product."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / seconds(lambda: a @ b, device, at_least_s)


def random_weights(encoder: Encoder) -> Encoder:
    """Values of the size that trained weights have, so that activations stay finite."""
    generator = torch.Generator(device=encoder.device).manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if name.endswith("gamma"):
            parameter.fill_(0.3)
        elif "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return encoder


def random_encoder(
    config: EncoderConfig, device: torch.device | str, compute_dtype: str, layer: int = -2
) -> Encoder:
    """One whose weights are drawn where they are needed: torch would fill a billion of them on the CPU first."""
    return random_weights(on_meta(config, layer, compute_dtype).to_empty(device=device))


def converted(encoder: Encoder, compute_dtype: str, device: torch.device | str) -> Encoder:
    """The same weights for products in another dtype, or on another device."""
    copy = on_meta(encoder.config, encoder.layer, compute_dtype)
    dtypes = {name: weight.dtype for name, weight in copy.state_dict().items()}
    weights = {
        name: weight.to(device, dtypes[name], copy=True) for name, weight in encoder.state_dict().items()
    }
    copy.load_state_dict(weights, assign=True)
    return copy


def frame_speed(encoder: Encoder, width: int, batch_sizes: list[int], at_least_s: float) -> dict[str, float]:
    """The best of the batch sizes."""
    height = HEIGHT_OF_640x480[width]
    patches = width * height // 196
    flops = tower_flops(encoder.config, patches) + pairs_flops(encoder, patches, 1)
    speeds = {}
    for batch_size in batch_sizes:
        pixels = torch.randint(
            0, 256, (batch_size, height, width, 3), dtype=torch.uint8, device=encoder.device
        )
        try:
            one_s = seconds(lambda pixels=pixels: encoder.frame_features(pixels), encoder.device, at_least_s)
        except torch.OutOfMemoryError:
            continue
        speeds[batch_size] = batch_size / one_s
    best = max(speeds, key=lambda size: speeds[size])
    return {
        "frames_per_s": speeds[best],
        "batch_size": best,
        "flop_per_s": speeds[best] * flops,
        "frames_per_s_by_batch_size": speeds,
    }


def causal_speed(encoder: Encoder, width: int, batch_size: int, steps: int) -> dict[str, float]:
    """One episode's lists, after a walk over the same ones: the first of a shape may cost a plan (`first_s`).

    FLOPs are those of the passes that were really made.
    """
    height = HEIGHT_OF_640x480[width]
    patches = width * height // 196
    images = torch.randint(0, 256, (steps, height, width, 3), dtype=torch.uint8)
    lists = [history_indexes(step) for step in range(steps)]
    prefixes = {tuple(frames[: depth + 1]) for frames in lists for depth in range(len(frames))}
    flops = steps * tower_flops(encoder.config, patches)
    flops += sum(pairs_flops(encoder, patches, len(prefix)) for prefix in prefixes)

    def walk() -> tuple[float, CausalStats]:
        stats = CausalStats()
        synchronize(encoder.device)
        began_s = time.perf_counter()
        for _ in encode_lists(encoder, lists, images.__getitem__, batch_size=batch_size, stats=stats):
            pass
        synchronize(encoder.device)
        return time.perf_counter() - began_s, stats

    first_s, _ = walk()
    elapsed_s, stats = walk()
    return {
        "first_s": first_s,
        "features_per_s": len(lists) / elapsed_s,
        "frame_passes_per_s": stats.frame_passes / elapsed_s,
        "flop_per_s": flops / elapsed_s,
    }


def profiles(encoder: Encoder, width: int, batch_size: int, steps: int) -> dict[str, Any]:
    """What a batch of single frames is made of, and an episode's lists."""
    shape = (max(batch_size, steps), HEIGHT_OF_640x480[width], width, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch = images[:batch_size].to(encoder.device)
    lists = [history_indexes(step) for step in range(steps)]

    def episode() -> None:
        for _ in encode_lists(encoder, lists, images.__getitem__, batch_size=batch_size):
            pass

    return {
        "frame": operation_shares(lambda: encoder.frame_features(batch), encoder.device, 3),
        "causal": operation_shares(episode, encoder.device, 1),
    }


def parity(encoder: Encoder, compute_dtype: str) -> dict[str, float]:
    """Relative L2 difference between this device and the CPU in float32, on one small image and a list of three."""
    images = torch.randint(0, 256, (3, 70, 98, 3), dtype=torch.uint8)
    on_cpu = converted(encoder, "float32", "cpu")

    def both(one: Encoder) -> tuple[torch.Tensor, torch.Tensor]:
        (causal,) = (f for _, f in encode_lists(one, [[0, 1, 2]], images.__getitem__, batch_size=1))
        return one.frame_features(images[:1])[0].double().cpu(), causal.double().cpu()

    pairs = zip(both(encoder), both(on_cpu), strict=True)
    frame, causal = (float((ours - reference).norm() / reference.norm()) for ours, reference in pairs)
    return {
        f"frame_{compute_dtype}_against_cpu_float32": frame,
        f"causal_{compute_dtype}_against_cpu_float32": causal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=SIZES, default="1b" if on_gpu else "small")
    parser.add_argument("--compute_dtype", choices=DTYPES, default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--widths", type=int, nargs="+", default=[518, 644], choices=HEIGHT_OF_640x480)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16, 32] if on_gpu else [1, 2])
    parser.add_argument("--causal_steps", type=int, default=60 if on_gpu else 12)
    parser.add_argument(
        "--seconds", type=float, default=5.0 if on_gpu else 2.0, help="length of one measurement"
    )
    parser.add_argument("--profile", action="store_true", help="also what the time is made of")
    parser.add_argument("--small", action="store_true", help="little and short, to see that it works")
    parser.add_argument("--no_result", action="store_true", help="print the figures, write no file")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.widths, arguments.batch_sizes, arguments.causal_steps, arguments.seconds = (
            [518],
            [1],
            2,
            0.1,
        )
    with torch.no_grad():
        figures = measure(arguments)
    if arguments.no_result:
        print(json.dumps(figures))
    else:
        record.write("encoder", arguments.device, vars(arguments), figures)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    device, dtype = torch.device(arguments.device), DTYPES[arguments.compute_dtype]
    figures: dict[str, Any] = {}
    for compute_dtype in dict.fromkeys(["float32", arguments.compute_dtype]):
        encoder = random_encoder(SIZES[arguments.size], device, compute_dtype)
        figures |= parity(encoder, compute_dtype)
    before = matrix_peak(device, dtype, arguments.seconds)
    speeds: dict[str, Any] = {}
    for width in arguments.widths:
        batch = max(arguments.batch_sizes) // 2 or 1
        speeds[f"frame_{width}"] = frame_speed(encoder, width, arguments.batch_sizes, arguments.seconds)
        speeds[f"causal_{width}"] = causal_speed(encoder, width, batch, arguments.causal_steps)
    peak = (before + matrix_peak(device, dtype, arguments.seconds)) / 2
    for speed in speeds.values():
        speed["share_of_matrix_peak"] = speed["flop_per_s"] / peak
    figures |= {"matrix_peak_flop_per_s": peak} | speeds
    for width in arguments.widths:
        best = speeds[f"frame_{width}"]["batch_size"]
        if arguments.profile:
            steps = min(arguments.causal_steps, 24)
            figures[f"profile_{width}"] = profiles(encoder, width, best, steps)
    return figures


if __name__ == "__main__":
    main()

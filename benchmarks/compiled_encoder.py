"""Ways to run the same encoder with less between its matrix products: torch.compile and CUDA graphs.

    blocks         both steps of every block compiled (torch.compile, Inductor)
    blocks_graphs  the same with mode="reduce-overhead": on CUDA each step is a CUDA graph of its own
    graph          nothing compiled; all kernels of a batch recorded once as one CUDA graph and replayed
    blocks_graph   both steps of every block compiled, and the batch recorded as one CUDA graph

Each stands between two measurements of the encoder as it is, on the same batch; what they compute is compared. A way
that does not work with this torch is listed with its error: that is a result as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from profile_parts import synchronize
from vggt_cache.encoder import Encoder
from vggt_cache.encoder.blocks import Block

PAYS = 1.03
"""Times as fast, at least, to be worth anything."""


@contextmanager
def compiled_blocks(mode: str = "default") -> Iterator[None]:
    """All blocks run their two steps compiled meanwhile. Weights are inputs, so that blocks share what is compiled."""
    project, finish = Block.project, Block.finish
    Block.project = torch.compile(project, mode=mode)  # type: ignore[method-assign]
    Block.finish = torch.compile(finish, mode=mode)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Block.project, Block.finish = project, finish  # type: ignore[method-assign]
        torch.compiler.reset()


def recorded(encoder: Encoder, pixels: Tensor) -> Callable[[], Tensor]:
    """The kernels of one batch as a CUDA graph. The result is overwritten by the next call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen and tables made before recording
        for _ in range(3):
            encoder.frame_features(pixels)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        features = encoder.frame_features(pixels)

    def replay() -> Tensor:
        graph.replay()
        return features

    return replay


def variants(device: torch.device) -> dict[str, tuple[str | None, bool]]:
    """By name: the mode of torch.compile or None, and whether the batch is recorded."""
    found: dict[str, tuple[str | None, bool]] = {"blocks": ("default", False)}
    if device.type == "cuda":
        found |= {
            "blocks_graphs": ("reduce-overhead", False),
            "graph": (None, True),
            "blocks_graph": ("default", True),
        }
    return found


def compare(encoder: Encoder, pixels: Tensor, calls: int) -> dict[str, Any]:
    """Each variant beside the encoder as it is."""
    figures: dict[str, Any] = {"batch_size": len(pixels), "variants": {}}
    for name, (mode, is_recorded) in variants(encoder.device).items():
        try:
            figures["variants"][name] = _one(encoder, pixels, calls, mode, is_recorded)
        except Exception as error:  # whatever a compiler raises: it is what the variant came to
            figures["variants"][name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    faster = {name: one["times_as_fast"] for name, one in figures["variants"].items() if "error" not in one}
    best = max(faster, key=lambda name: faster[name], default=None)
    figures["pays"] = best if best is not None and faster[best] >= PAYS else None
    return figures


def _one(
    encoder: Encoder, pixels: Tensor, calls: int, mode: str | None, is_recorded: bool
) -> dict[str, float]:
    with torch.no_grad():
        plain = encoder.frame_features(pixels).double()
        plain_s = [_seconds(lambda: encoder.frame_features(pixels), encoder.device, calls)]
        with compiled_blocks(mode) if mode else nullcontext():
            began_s = time.perf_counter()
            work = recorded(encoder, pixels) if is_recorded else lambda: encoder.frame_features(pixels)
            difference = float((work().double() - plain).norm() / plain.norm())
            compiling_s = time.perf_counter() - began_s
            work()
            variant_s = _seconds(work, encoder.device, 2 * calls)
        plain_s.append(_seconds(lambda: encoder.frame_features(pixels), encoder.device, calls))
    return {
        "times_as_fast": sum(plain_s) / 2 / variant_s,
        "frames_per_s": len(pixels) / variant_s,
        "frames_per_s_plain": 2 * len(pixels) / sum(plain_s),
        "first_call_s": compiling_s,
        "relative_difference": difference,
    }


def _seconds(work: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    began_s = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return (time.perf_counter() - began_s) / calls

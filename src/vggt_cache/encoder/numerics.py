"""Features must not depend on the settings of the training loop around them."""

from __future__ import annotations

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vggt_cache.errors import require_one_of

ATTENTION = "VGGT_CACHE_SDPA"
"""Environment variable: which attention CUDA uses, `auto` (default), `flash` or `cudnn`."""
PLAN_AFTER = 32
"""Steps of one shape after which `auto` lets cuDNN build its plan for it."""
_PLAN_FREE = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_steps: Counter[tuple[int, ...]] = Counter()


@contextmanager
def own_numerics(device: torch.device, *shape: int) -> Iterator[None]:
    """No gradient, no autocast, and float32 products in float32 (not TF32 or bfloat16), whatever the caller has set.

    `shape`: all numbers that attention's shapes in this step follow from.
    """
    # Reading the setting for all fails once a caller has used those of the backends, which came with torch 2.9.
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    newer = [backend for backend in backends if hasattr(backend, "fp32_precision")]
    with ExitStack() as stack:
        for exact in map(_exact, newer) if newer else [_all_exact()]:
            stack.enter_context(exact)
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(_attention(shape))
        yield


def _attention(shape: tuple[int, ...]) -> AbstractContextManager[Any]:
    """cuDNN, where it has been worth it to build a plan.

    cuDNN is the fastest on Hopper, but takes about half a second for each shape that it has not met. So a shape first
    goes by flash attention, which needs no plan, until it has occurred so often that a plan costs no more
    than what was lost without one: with any shapes, the total is at most twice that of the better way.
    """
    wanted = os.environ.get(ATTENTION, "auto")
    require_one_of(ATTENTION, wanted, ("auto", "flash", "cudnn"))
    _steps[shape] += 1
    if wanted == "flash" or (wanted == "auto" and _steps[shape] <= PLAN_AFTER):
        return sdpa_kernel(_PLAN_FREE)
    newer = "set_priority" in inspect.signature(sdpa_kernel).parameters
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *_PLAN_FREE], **{"set_priority": True} if newer else {})


@contextmanager
def _exact(backend: Any) -> Iterator[None]:
    before = backend.fp32_precision
    if before in ("none", "ieee"):
        yield
        return
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = "none"  # what it was if the caller has set it for all backends at once
        if backend.fp32_precision != before:
            backend.fp32_precision = before


@contextmanager
def _all_exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

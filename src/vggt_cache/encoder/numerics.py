"""Features must not depend on the settings of the training loop around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def own_numerics(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, and float32 products in float32 (not TF32 or bfloat16), whatever the caller has set."""
    with ExitStack() as stack:
        for backend in _matmul_backends():
            stack.enter_context(_exact(backend))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _matmul_backends() -> list[Any]:
    """Where torch keeps the precision of float32 products; before 2.9 there was one setting for all."""
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    # Reading the old setting fails once a caller has used the new ones, so it is left alone where those exist.
    return [backend for backend in backends if hasattr(backend, "fp32_precision")] or [_OldSetting()]


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
        backend.fp32_precision = before


class _OldSetting:
    """`torch.set_float32_matmul_precision` in the form of the newer settings."""

    @property
    def fp32_precision(self) -> str:
        precision = torch.get_float32_matmul_precision()
        return "ieee" if precision == "highest" else precision

    @fp32_precision.setter
    def fp32_precision(self, precision: str) -> None:
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)

"""What a piece of work is made of, by torch.profiler: classes of operations, and named parts.

A class's share is its time over the time of all the work. On a GPU an operation's time is that of the kernels that it
launched itself; what no kernel fills (`outside`) is measured against the same work without the profiler, which slows
launching. On a CPU it is the operation's own time, and `outside` is what Python does between operations.

A part is a range of the program. Where there is a GPU it is waited for at both ends of each, so that the range's time
is that of its work.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "part: "
CLASSES = (
    (
        "attention",
        ("scaled_dot_product", "flash_attention", "efficient_attention", "cudnn_attention", "softmax"),
    ),
    (
        "matrix products",
        ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "::matmul", "convolution", "mkldnn_"),
    ),
    ("norms", ("layer_norm", "rms_norm", "::mean", "::rsqrt")),
    ("activations", ("gelu", "silu", "cross_entropy", "log_softmax", "nll_loss")),
    (
        "copies",
        (
            "::copy_",
            "::cat",
            "::clone",
            "::stack",
            "::_to_copy",
            "::contiguous",
            "::flip",
            "memcpy",
            "memset",
        ),
    ),
    ("optimizer", ("_fused_adamw", "_foreach", "optimizer.")),
)
ELEMENTWISE = "elementwise"
"""All else: residuals, scales, rotations, sums, indexing."""
OUTSIDE = "outside"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def class_of(operation: str) -> str:
    lower = operation.lower()
    if "log_softmax" in lower:
        return "activations"
    return next((name for name, marks in CLASSES if any(mark in lower for mark in marks)), ELEMENTWISE)


def operation_shares(work: Callable[[], object], device: torch.device, calls: int) -> dict[str, Any]:
    """Shares of a call's time by class, and the largest single operations."""
    work()  # the first call is slower
    plain_s = _elapsed_s(work, device, calls)
    with new_profiler(device) as profiler:
        profiled_s = _elapsed_s(work, device, calls)
    on_gpu = device.type == "cuda"
    whole_s = plain_s if on_gpu else profiled_s
    by_operation = {
        event.key: 1e-6 * (event.self_device_time_total if on_gpu else event.self_cpu_time_total)
        for event in profiler.key_averages()
        if event.device_type == DeviceType.CPU and _is_operation(event.key)
    }
    classes: dict[str, float] = defaultdict(float)
    for operation, seconds in by_operation.items():
        classes[class_of(operation)] += seconds / whole_s
    largest = sorted(by_operation, key=lambda name: -by_operation[name])[:8]
    return {
        "seconds_per_call": plain_s / calls,
        "shares": dict(classes) | {OUTSIDE: 1 - sum(classes.values())},
        "largest_operations": {name: by_operation[name] / whole_s for name in largest},
    }


def _is_operation(name: str) -> bool:
    """Not a range, nor what CUDA's own interface took of the processor."""
    return "::" in name or name.startswith(("_fused", "Optimizer"))


def _elapsed_s(work: Callable[[], object], device: torch.device, calls: int) -> float:
    synchronize(device)
    began_s = time.perf_counter()
    for _ in range(calls):
        work()
    synchronize(device)
    return time.perf_counter() - began_s


def new_profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


# ---------------------------------------------------------------- named parts


@contextmanager
def part(name: str, device: torch.device) -> Iterator[None]:
    synchronize(device)
    with record_function(PREFIX + name):
        yield
        synchronize(device)


def around_module(module: torch.nn.Module, name: str, device: torch.device) -> Callable[[], None]:
    """Every forward of the module is the part `name`, until the function that is returned is called."""
    entered: list[Any] = []

    def before(*_: object) -> None:
        entered.append(part(name, device))
        entered[-1].__enter__()

    def after(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def remove() -> None:
        for hook in hooks:
            hook.remove()

    return remove


def part_seconds(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of each named part of `work`, which is run once."""
    with new_profiler(device) as profiler:
        work()
        synchronize(device)
    return {
        event.key.removeprefix(PREFIX): 1e-6 * event.cpu_time_total
        for event in profiler.key_averages()
        if event.key.startswith(PREFIX) and event.device_type == DeviceType.CPU
    }

"""Memory and use of this machine's NVIDIA cards, if there is a way to ask: NVML, else nvidia-smi, else nothing."""

from __future__ import annotations

import importlib
import subprocess
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_QUERY = "--query-gpu=index,name,memory.used,memory.total,utilization.gpu"
_PATIENCE_S = 10


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card at one moment; None for what its driver does not tell."""

    index: int
    name: str
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    use_percent: float | None
    """Share of the last sampling period in which any kernel ran."""


class GpuReader:
    """Asks the first way that answers, and never again the ones that do not. Raises nothing."""

    def __init__(self) -> None:
        self._ways: list[Callable[[], list[Gpu]]] = [_answers_of_nvml().__next__, read_nvidia_smi]

    def read(self) -> list[Gpu]:
        """All cards of this machine, in the driver's order."""
        while self._ways:
            try:
                return self._ways[0]()
            except Exception:  # the driver's errors have classes of their own; a monitor can do without cards
                del self._ways[0]
        return []


def _answers_of_nvml() -> Iterator[list[Gpu]]:
    """The cards each time they are asked for, through the package nvidia-ml-py, where it is installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an outdated package of the same name warns when imported
        nvml = importlib.import_module("pynvml")
    nvml.nvmlInit()
    while True:
        yield [_card_of_nvml(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def _card_of_nvml(nvml: Any, index: int) -> Gpu:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def told(ask: Callable[[Any], Any]) -> Any:
        try:
            return ask(handle)
        except nvml.NVMLError:
            return None  # not every card and driver tells everything (MIG slices, containers)

    name = told(nvml.nvmlDeviceGetName) or "GPU"
    memory, use = told(nvml.nvmlDeviceGetMemoryInfo), told(nvml.nvmlDeviceGetUtilizationRates)
    return Gpu(
        index=index,
        name=name.decode() if isinstance(name, bytes) else str(name),
        memory_used_bytes=int(memory.used) if memory else None,
        memory_total_bytes=int(memory.total) if memory else None,
        use_percent=float(use.gpu) if use else None,
    )


def read_nvidia_smi() -> list[Gpu]:
    """Asks the tool nvidia-smi. Raises OSError or subprocess.SubprocessError where it cannot answer."""
    command = ["nvidia-smi", _QUERY, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=True)
    return [_card_of_line(line) for line in answer.stdout.splitlines() if line.strip()]


def _card_of_line(line: str) -> Gpu:
    index, *name, used, total, use = (field.strip() for field in line.split(","))
    used_mib, total_mib = (int(size) if size.isdecimal() else None for size in (used, total))  # or "[N/A]"
    return Gpu(
        index=int(index),
        name=", ".join(name),
        memory_used_bytes=None if used_mib is None else used_mib * 2**20,
        memory_total_bytes=None if total_mib is None else total_mib * 2**20,
        use_percent=float(use) if use.isdecimal() else None,
    )

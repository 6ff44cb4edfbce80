"""Memory and use of this machine's NVIDIA cards, if there is a way to ask: NVML, else nvidia-smi, else nothing."""

from __future__ import annotations

import importlib
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_QUERY = "index,name,memory.used,memory.total,utilization.gpu"
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
        self._ways: list[Callable[[], list[Gpu]]] = [NvmlReader(), read_nvidia_smi]

    def read(self) -> list[Gpu]:
        """All cards of this machine, in the driver's order."""
        while self._ways:
            try:
                return self._ways[0]()
            except Exception:  # the driver's errors have classes of their own; a monitor can do without cards
                del self._ways[0]
        return []


class NvmlReader:
    """Asks NVML through the package nvidia-ml-py, where it is installed."""

    def __init__(self) -> None:
        self._nvml: Any = None

    def __call__(self) -> list[Gpu]:
        if self._nvml is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an outdated package of the same name warns when imported
                nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            self._nvml = nvml
        return [self._card(index) for index in range(self._nvml.nvmlDeviceGetCount())]

    def _card(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = self._told(nvml.nvmlDeviceGetMemoryInfo, handle)
        use = self._told(nvml.nvmlDeviceGetUtilizationRates, handle)
        name = self._told(nvml.nvmlDeviceGetName, handle) or "GPU"
        return Gpu(
            index=index,
            name=name.decode() if isinstance(name, bytes) else str(name),
            memory_used_bytes=int(memory.used) if memory else None,
            memory_total_bytes=int(memory.total) if memory else None,
            use_percent=float(use.gpu) if use else None,
        )

    def _told(self, ask: Callable[[Any], Any], handle: Any) -> Any:
        try:
            return ask(handle)
        except self._nvml.NVMLError:
            return None  # not every card and driver tells everything (MIG slices, containers)


def read_nvidia_smi() -> list[Gpu]:
    """Asks the tool nvidia-smi. Raises OSError or subprocess.SubprocessError where it cannot answer."""
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, timeout=_PATIENCE_S, check=True,
    )  # fmt: skip
    return [_card_of_line(line) for line in answer.stdout.splitlines() if line.strip()]


def _card_of_line(line: str) -> Gpu:
    index, *name, used, total, use = (field.strip() for field in line.split(","))
    return Gpu(
        index=int(index),
        name=", ".join(name),
        memory_used_bytes=_mebibytes(used),
        memory_total_bytes=_mebibytes(total),
        use_percent=_number(use),
    )


def _number(field: str) -> float | None:
    try:
        return float(field)
    except ValueError:
        return None  # "[N/A]" and the like


def _mebibytes(field: str) -> int | None:
    number = _number(field)
    return None if number is None else int(number * 2**20)

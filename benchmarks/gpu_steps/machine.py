"""What the card, its links and its disks can do: the limits that all other figures stand beside."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import record
from bench_encoder import seconds
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting

SMI = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"


def run(setting: Setting, notes: Notes) -> None:
    notes.measure("machine", record.machine)
    notes.measure("hardware", lambda: record.hardware_name(str(setting.device)))
    notes.measure("software", software)
    notes.measure("matrix_peak_flop_per_s", setting.matrix_peak)
    notes.measure("device_copy_bytes_per_s", lambda: device_copy(setting))
    if not setting.dry:
        notes.measure("card", card)
        notes.measure("to_device_bytes_per_s", lambda: link(setting, to_device=True))
        notes.measure("to_host_bytes_per_s", lambda: link(setting, to_device=False))
    notes.measure("write_memory_bytes_per_s", lambda: write_speed(setting, setting.work))
    notes.measure("write_disk_bytes_per_s", lambda: write_speed(setting, Path(tempfile.gettempdir())))


def software() -> dict[str, str | int | None]:
    """What decides which kernels run, and what is missing."""
    found: dict[str, str | int | None] = {"cudnn": torch.backends.cudnn.version()}
    for name in ("triton", "transformers", "torchvision", "flash_attn", "deepspeed", "zstandard"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"commit": os.environ.get("COMMIT") or record.commit()}


def card() -> str:
    command = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def device_copy(setting: Setting) -> float:
    """Bytes read and written."""
    source = torch.empty(1 << (20 if setting.dry else 32), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return 2 * len(source) / seconds(lambda: target.copy_(source), setting.device, setting.measurement_s)


def link(setting: Setting, *, to_device: bool) -> float:
    """Between pinned memory of the host and the device."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(len(host), dtype=torch.uint8, device=setting.device)
    source, target = (host, there) if to_device else (there, host)
    copy_s = seconds(lambda: target.copy_(source, non_blocking=True), setting.device, setting.measurement_s)
    return len(host) / copy_s


def write_speed(setting: Setting, folder: Path) -> float:
    """Until it is durable."""
    part, count = os.urandom(1 << 22), 2 if setting.dry else 128
    with tempfile.TemporaryFile(dir=folder) as file:
        began_s = time.perf_counter()
        for _ in range(count):
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
        return count * len(part) / (time.perf_counter() - began_s)

"""Where benchmark results go: `results/<theme>_<hardware>_<date>.json`, with the full configuration."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def hardware_name(device: str) -> str:
    """`h200`, `cpu2`: short enough for a file name."""
    if device.startswith("cuda"):
        return re.sub(r"nvidia|[^a-z0-9]", "", torch.cuda.get_device_name().lower())
    return f"cpu{os.cpu_count()}"


def commit() -> str:
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=RESULTS.parent, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(theme: str, device: str, configuration: dict[str, Any], figures: dict[str, Any]) -> Path:
    """Write one result, and print it as one JSON line."""
    today = datetime.date.today().isoformat()
    result = {
        "theme": theme,
        "date": today,
        "commit": commit(),
        "machine": machine(),
        "configuration": configuration,
        "figures": figures,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{theme}_{hardware_name(device)}_{today}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(figures))
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
    return path

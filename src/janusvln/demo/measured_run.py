"""A training run as a process of its own, and what it logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vggt_cache.errors import VggtCacheError


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a run logged in each step, and what it took."""

    steps: list[dict[str, Any]]
    peak_bytes: int
    """Largest resident memory of the process."""

    def column(self, name: str) -> list[float]:
        """A logged figure, one for each step that has it."""
        return [float(step[name]) for step in self.steps if name in step]

    @property
    def losses(self) -> list[float]:
        return self.column("loss")

    @property
    def seconds_per_step(self) -> float:
        """The middle of all steps but the first, which also starts the workers."""
        seconds = sorted(1 / rate for rate in self.column("samples_per_s")[1:])
        return seconds[len(seconds) // 2]


def run_training(
    output_dir: str | Path, flags: Sequence[str], environment: Mapping[str, str] | None = None
) -> MeasuredRun:
    """`python -m janusvln.train`, logging every step. Raises VggtCacheError where it fails."""
    command = [sys.executable, "-m", "janusvln.train", "--output_dir", str(output_dir)]
    command += ["--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", *flags]
    log_path = Path(output_dir) / "train.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(environment or {})})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log_path.read_text(errors="replace").strip().splitlines()[-1:]
        raise VggtCacheError(
            f"training ended with exit code {process.returncode} ({' '.join(last)}): all it said is in {log_path}"
        )
    state = json.loads((Path(output_dir) / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    return MeasuredRun(steps=steps, peak_bytes=usage.ru_maxrss * 1024)

"""The demo's second half: a tiny model trained live and from the cache, side by side, each run a process of its own.

It goes on in the directory where `vggt-cache demo` has left data, encoder and both caches.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from janusvln.demo.tiny_qwen import write_tiny_qwen
from vggt_cache.errors import SettingsError, VggtCacheError
from vggt_cache.identity import CONTEXTS
from vggt_cache.precompute.report import bytes_text

STEPS = 10
_SHOWN = (1, 2, 3, 5, 8, 10)


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """What a run logged in each step, and what it took."""

    steps: list[dict[str, Any]]
    peak_bytes: int
    """Largest resident memory of the process."""

    def column(self, name: str) -> list[float]:
        """A logged figure, one for each step that has it."""
        return [float(step[name]) for step in self.steps if name in step]

    def mean(self, name: str) -> float:
        """Of a figure that is logged; 0 where it never is, as for a cache that is not there."""
        return statistics.mean(self.column(name) or [0.0])

    @property
    def losses(self) -> list[float]:
        return self.column("loss")

    @property
    def seconds_per_step(self) -> float:
        """The middle of all steps but the first, which also starts the workers."""
        return statistics.median_high(1 / rate for rate in self.column("samples_per_s")[1:])


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


def compare(directory: str) -> None:
    """Train live and cached, in each context that JanusVLN takes. Prints what was measured."""
    root = Path(directory)
    if not (root / "cache").is_dir():
        raise SettingsError(f"{directory} holds no demo yet: run `vggt-cache demo {directory}` first")
    qwen = write_tiny_qwen(root / "qwen")
    # The cached run gets no path of VGGT: what is fully cached never loads it.
    features = {
        "live": ["--vggt_model_path", str(root / "model")],
        "cached": ["--vggt_cache_dir", str(root / "cache"), "--vggt_cache_miss", "error"],
    }
    for context in (name for name, rule in CONTEXTS.items() if not rule.of_all_frames):
        title = f"== Train, context {context}: {STEPS} steps live, then the same {STEPS} from the cache"
        print(f"\n{title}", flush=True)
        folder = root / "train" / context
        shutil.rmtree(folder, ignore_errors=True)
        flags = ["--model_name_or_path", str(qwen), "--train_data_root", str(root / "data")]
        flags += f"--context {context} --max_steps {STEPS} --learning_rate 1e-3 --image_size 224".split()
        flags += ["--use_cpu", "True", "--tune_mm_llm", "True", "--tune_mm_mlp", "True"]
        flags += ["--per_device_train_batch_size", "1"]
        env = {"VGGT_CACHE_DIR": ""}
        _print({name: run_training(folder / name, flags + more, env) for name, more in features.items()})


def _print(runs: Mapping[str, MeasuredRun]) -> None:
    print(f"{'step':>10} " + " ".join(f"{step:8}" for step in _SHOWN))
    for name, run in runs.items():
        print(f"{name:>10} " + " ".join(f"{run.losses[step - 1]:8.5f}" for step in _SHOWN))
    print(f"{'':>10} {'s/it':>8} {'hit rate':>9} {'encode':>10} {'cache wait':>11} {'peak memory':>12}")
    for name, run in runs.items():
        print(
            f"{name:>10} {run.seconds_per_step:8.3f} {run.mean('cache_hit_rate'):9.2f} "
            f"{run.mean('encode_ms'):7.0f} ms {run.mean('cache_wait_ms'):8.2f} ms {bytes_text(run.peak_bytes):>12}"
        )
    live, cached = runs.values()
    largest = max(abs(a - b) / abs(a) for a, b in zip(live.losses, cached.losses, strict=True))
    speed_up = live.seconds_per_step / cached.seconds_per_step
    print(f"speed-up {speed_up:.1f} x; largest relative difference between the losses {largest:.1e}")

"""All that only a GPU can tell, in one command of at most 500 seconds: `python benchmarks/gpu.py`, or `make gpu`.

It needs nothing installed but torch and transformers, no network and no checkpoint: weights are random, in the real
shapes. Each step is a process of its own with a limit of its own, the most valuable first; what one leaves of its time
may be used by the next. A step that fails or is killed costs what it had not yet measured, for every figure is on disk
as soon as it is known: `figures.jsonl` in $OUT (default `gpu_out`), and what the steps print in `log.txt`. $COMMIT
names the commit where there is no repository.

    machine      the limits that every other figure stands beside; short, so it comes first
    parity       whether features are right: a fast wrong encoder is worth nothing
    frame        share of the matrix peak in context frame: the figure that the encoder is built for
    causal       the same where prefixes are shared, and how many times as fast as the published way
    precompute   the command from end to end, which may be held up by what stands around the encoder
    step         a training step at real size, four ways to its features, with memory and profile
    training     the training command live and cached: equal losses; its speed is in `step`
    memory       out of memory halves the batch: rare, but it must hold on a card that is full
    plans        what a new shape costs: explains `causal` and `step` where they fall short
    plans_deprioritised   the same with cuDNN's attention put last
    int8         decoded on the device as on the CPU: small, and least likely to surprise

`--only STEP` (repeatable) runs chosen steps, `--dry` all of it tiny on a CPU, to see that it works. `gpu_rows.py` says
what the figures mean: the tables' rows, what was aimed at, and what was predicted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from gpu_rows import report
from gpu_steps.notes import Notes, append

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 500
DRY_S = 1800
"""Nothing is measured in a dry run, on a machine that may be busy: it has no other limit."""
_ENDING_S = 6
"""Kept back of the budget, to remove what was made."""
_LEAST_S = 8
"""A step with less is not begun: loading torch takes as long."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process: `run(setting, notes)` of a module."""

    name: str
    module: str
    limit_s: float
    environment: Mapping[str, str] = field(default_factory=dict)


def _step(name: str, limit_s: float, module: str = "", **environment: str) -> Step:
    return Step(name=name, module=f"gpu_steps.{module or name}", limit_s=limit_s, environment=environment)


# Steps that time more than the encoder fix its attention, so that it makes no plan while the clock runs.
STEPS = (
    _step("machine", 25),
    _step("parity", 60),
    _step("frame", 65),
    _step("causal", 70),
    _step("precompute", 80, VGGT_CACHE_SDPA="cudnn"),
    _step("step", 90, VGGT_CACHE_SDPA="flash"),
    _step("training", 40),
    _step("memory", 25),
    _step("plans", 15),
    _step("plans_deprioritised", 12, module="plans", TORCH_CUDNN_SDPA_DEPRIORITIZED="1"),
    _step("int8", 12),
)


class Running:
    """A step's process and all that it starts: a session of its own, so that one signal ends it whole."""

    def __init__(self, step: Step, limit_s: float, out: Path, work: Path, *, dry: bool) -> None:
        self.step, self._out = step, out
        self._began_s = time.monotonic()
        self._ends_s = self._began_s + limit_s
        command = [sys.executable, __file__, "--out", str(out), "--work", str(work)]
        command += ["--step", step.name, "--module", step.module, *(["--dry"] if dry else [])]
        with open(out / "log.txt", "ab") as log:
            log.write(f"\n===== {step.name}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, start_new_session=True, env=_environment(step, dry=dry)
            )

    def is_over(self) -> bool:
        """Whether it has ended, or has to."""
        # Left as a zombie, so that its number still stands for it when the rest of its session is killed.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        ended = os.waitid(os.P_PID, self._process.pid, flags) is not None
        return ended or time.monotonic() >= self._ends_s

    def end(self) -> bool:
        """Kill what is left of it, and tell how it ended. Returns whether it went well."""
        late = time.monotonic() >= self._ends_s
        code = self.kill()
        took_s = round(time.monotonic() - self._began_s, 1)
        line = {"step": self.step.name, "ended": None if late and code else code, "took_s": took_s}
        append(self._out, line)
        return code == 0

    def kill(self) -> int:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return self._process.wait()


def _environment(step: Step, *, dry: bool) -> dict[str, str]:
    """Ours from the checkout; `tests` holds the golden files. On a CPU two steps share the cores."""
    paths = [str(ROOT / name) for name in ("src", "benchmarks", "tests")]
    kept = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **step.environment}
    environment["PYTHONPATH"] = os.pathsep.join([*paths, *([kept] if kept else [])])
    return environment | ({"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if dry else {})


def run_all(steps: Sequence[Step], out: Path, *, budget_s: float = BUDGET_S, dry: bool = False) -> bool:
    """Run the steps in order, one at a time (two where all is small and on a CPU). Returns whether all went well."""
    ends_s = time.monotonic() + (DRY_S if dry else budget_s - _ENDING_S)
    out.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="vggt-gpu-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    waiting, running, well = deque(steps), list[Running](), True
    try:
        while waiting or running:
            while waiting and len(running) < (2 if dry else 1):
                step, left_s = waiting.popleft(), ends_s - time.monotonic()
                if left_s < min(_LEAST_S, step.limit_s):
                    append(out, {"step": step.name, "skipped": "no time was left"})
                    well = False
                    continue
                spare_s = left_s - step.limit_s - sum(later.limit_s for later in waiting)
                limit_s = left_s if dry else min(left_s, step.limit_s + max(0.0, spare_s))
                running.append(Running(step, limit_s, out, work, dry=dry))
            time.sleep(0.02)
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                well = one.end() and well
    finally:
        for one in running:
            one.kill()
        shutil.rmtree(work, ignore_errors=True)
    return well


# ---------------------------------------------------------------- in a step's process


def run_step(arguments: argparse.Namespace) -> int:
    """Exit code 1 where any figure failed."""
    notes = Notes(arguments.out, arguments.step)
    with notes.expecting("the step as a whole"):
        from gpu_steps.setting import Setting

        setting = Setting(dry=arguments.dry, work=arguments.work)
        importlib.import_module(arguments.module).run(setting, notes)
    return int(notes.failed > 0)


# ---------------------------------------------------------------- the command


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="STEP", help="this step; repeatable"
    )
    parser.add_argument("--dry", action="store_true", help="all of it tiny on a CPU")
    parser.add_argument("--list", action="store_true", help="the steps and their limits in seconds")
    parser.add_argument("--out", type=Path, help="default: $OUT, or gpu_out; below it, dry, of a dry run")
    for inner in ("--step", "--module"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{step.name:20} {step.limit_s:4.0f}" for step in STEPS))
        return 0
    if arguments.step:
        return run_step(arguments)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that steps are ended and the work folder is removed
    out = arguments.out or Path(os.environ.get("OUT") or "gpu_out") / ("dry" if arguments.dry else "")
    chosen = [step for step in STEPS if not arguments.only or step.name in arguments.only]
    well = run_all(chosen, out, dry=arguments.dry)
    print("\n".join(report(out)))
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())

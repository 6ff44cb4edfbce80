"""Runs that are told to stop, or killed, and started again with the same command."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from train_kit import Kit

ROOT = Path(__file__).resolve().parent.parent
CODES = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130, signal.SIGKILL: -9}


@dataclass(frozen=True)
class Command:
    """One command that is started again and again."""

    kit: Kit
    folder: Path
    more: Sequence[object]
    processes: int = 1
    context: str = "frame"

    @property
    def output_dir(self) -> Path:
        return self.folder / "out"

    def start(self, **environment_too: str) -> Started:
        launcher: list[str] = []
        if self.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        flags = self.kit.flags(self.output_dir, *self.more, context=self.context)
        program = [str(ROOT / "tests" / "noted_training.py"), str(self.folder / "notes"), *flags]
        environment = {name: value for name, value in os.environ.items() if name != "VGGT_CACHE_DIR"}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "DS_ACCELERATOR": "cpu"}
        self.folder.mkdir(parents=True, exist_ok=True)
        log = self.folder / f"log{len(list(self.folder.glob('log*')))}"
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, *launcher, *program], stdout=file, stderr=file, start_new_session=True,
                env=environment | {"PYTHONUNBUFFERED": "1"} | environment_too,
            )  # fmt: skip
        return Started(process, log, self.processes)

    def finish(self) -> str:
        """Start it once more, to the end; returns its log."""
        started = self.start()
        assert started.end() == 0, started.said()[-3000:]
        return started.said()

    def samples(self) -> dict[int, list[int]]:
        """Of each step. One that was trained again after a kill had the same ones."""
        found: dict[int, dict[int, list[int]]] = {}
        for line in (self.folder / "notes").read_text().splitlines():
            step, rank, samples = json.loads(line)
            assert found.setdefault(step, {}).setdefault(rank, samples) == samples
        return {step: sorted(at for one in ranks.values() for at in one) for step, ranks in found.items()}


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    log: Path
    processes: int

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.process.pid)
        return [launcher] if self.processes == 1 else launcher.children()

    def wait_for_steps(self, count: int) -> bool:
        """False: it has ended before."""
        return self.wait_for("'cache_hit_rate'", count)

    def wait_for(self, words: str, count: int = 1) -> bool:
        while self.said().count(words) < count:
            if self.process.poll() is not None:
                return False
            time.sleep(0.005)
        return True

    def send(self, number: signal.Signals, *, rank: int | None = None) -> None:
        """To the ranks as the launcher does, or to one alone; to a single one with its workers, as SLURM does."""
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if self.processes == 1 or number == signal.SIGKILL:
                for child in self.ranks() if self.processes > 1 else ():
                    child.send_signal(number)
                os.killpg(self.process.pid, number)
            else:
                for child in self.ranks()[slice(None) if rank is None else slice(rank, rank + 1)]:
                    child.send_signal(number)

    def end(self) -> int:
        try:
            return self.process.wait(timeout=240)
        finally:
            if self.process.poll() is None:
                self.send(signal.SIGKILL)

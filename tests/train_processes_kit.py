"""Training in several processes, for the tests: torchrun on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train_kit import Kit, logged

ROOT = Path(__file__).resolve().parent.parent


def start(flags: Sequence[str], *, processes: int = 2, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {name: value for name, value in os.environ.items() if name != "VGGT_CACHE_DIR"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "DS_ACCELERATOR": "cpu"}
    environment["PYTHONUNBUFFERED"] = "1"  # tests wait for lines of the log
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        return subprocess.Popen(
            [*command, "-m", "janusvln.train", *flags],
            stdout=file, stderr=file, env=environment, start_new_session=True,
        )  # fmt: skip


def train(
    kit: Kit, output_dir: Path, *more: object, config: str | None, **options: object
) -> list[dict[str, float]]:
    """Run to the end on two processes; returns what was logged."""
    zero = [] if config is None else ["--deepspeed", ROOT / "scripts" / config]
    flags = kit.flags(output_dir, "--per_device_train_batch_size", 1, *zero, *more, **options)  # type: ignore[arg-type]
    log = output_dir / "log"
    code = start(flags, log=log).wait(timeout=240)
    assert code == 0, log.read_text()[-3000:]
    return logged(output_dir)

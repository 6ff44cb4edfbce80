"""Logs as trainers write them, for the tests of the monitor."""

from __future__ import annotations

import os

from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.state import TrainingState
from vggt_cache.monitor.tail import Pieces

TOTAL = 28710


def clock(seconds: float) -> str:
    """tqdm's way to write a time."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60:02d}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def bar(step: int, elapsed_s: float, *, total: int = TOTAL, rate: str = "18.55s/it", name: str = "") -> str:
    """One state of a bar as tqdm draws it: a carriage return before it, nothing behind."""
    left = clock((total - step) * 18.55)
    return f"\r{name}{100 * step // total:3d}%|▍         | {step}/{total} [{clock(elapsed_s)}<{left}, {rate}]"


def metrics(version: int = 5, **values: float) -> str:
    """A line of metrics as transformers 4 (numbers) or 5 (strings) prints it."""
    if version == 4:
        return f"{values!r}\n"
    return f"{ {name: f'{value:.4g}' for name, value in values.items()}!r}\n"


def training_log(
    steps: int,
    *,
    first: int = 0,
    s_per_it: float = 18.5,
    total: int = TOTAL,
    version: int = 5,
    chatter: int = 0,
    **more: float,
) -> str:
    """A run from step `first` on; a line of metrics at every tenth step, `chatter` bytes of warnings at each."""
    parts = [bar(0, 0, total=total, rate="?it/s")]
    for step in range(first + 1, first + steps + 1):
        parts.append(bar(step, 20 + (step - first - 1) * s_per_it, total=total))
        if chatter:
            parts.append(f"[rank3] UserWarning: {'x' * chatter}\n")
        if step % 10 == 0:
            # tqdm.write clears the bar, and it is drawn again afterwards.
            line = metrics(
                version, loss=2.0 / step, grad_norm=1.5, learning_rate=2e-5, epoch=step / total, **more
            )
            parts.append(f"\r{' ' * 60}\r{line}{parts[-1] if not chatter else parts[-2]}")
    return "".join(parts)


BANNER = """[INFO|trainer.py:2414] 2026-02-02 17:00:00,123 >> ***** Running training *****
[INFO|trainer.py:2415] 2026-02-02 17:00:00,123 >>   Num examples = 612,480
[INFO|trainer.py:2416] 2026-02-02 17:00:00,123 >>   Num Epochs = 3
[INFO|trainer.py:2417] 2026-02-02 17:00:00,123 >>   Instantaneous batch size per device = 1
[INFO|trainer.py:2420] 2026-02-02 17:00:00 >>   Total train batch size (w. parallel, distributed & accumulation) = 64
[INFO|trainer.py:2422] 2026-02-02 17:00:00,124 >>   Total optimization steps = 28,710
"""

ENDED = metrics(
    train_runtime=123.4,
    train_samples_per_second=520.0,
    train_steps_per_second=8.1,
    train_loss=0.25,
    epoch=3.0,
)

ORIGINAL_TRAINER = (
    "[2026-02-02 16:59:00,001] [INFO] [real_accelerator.py:222:get_accelerator] Setting ds_accelerator to cuda\n"
    "Loading vggt\n"
    + "".join(bar(n, n, total=4, rate="1.05s/it", name="Loading checkpoint shards: ") for n in range(5))
    + "\n[2026-02-02 16:59:30,001] [INFO] [config.py:1003:print]   train_batch_size ............. 64\n"
    + bar(612480, 31, total=612480, rate="19757.1it/s")
    + "\n`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.\n" * 8
    + bar(0, 0, rate="?it/s")
    + "/usr/lib/python3/torch/utils/checkpoint.py:87: UserWarning: None of the inputs have requires_grad=True\n"
    + "".join(
        bar(n, 78 * n, rate="77.86s/it")
        + (
            "[2026-02-02 18:00:00,001] [INFO] [timer.py:264:stop] epoch=0/micro_step=80/global_step=10, "
            "RunningAvgSamplesPerSec=0.8219, CurrSamplesPerSec=0.83, MemAllocated=61.2GB, MaxMemAllocated=75.1GB\n"
            + metrics(4, loss=1.9 - n / 100, grad_norm=2.25, learning_rate=1.2e-06, epoch=n / TOTAL)
            if n % 10 == 0
            else ""
        )
        for n in range(1, 31)
    )
)
"""As the trainer of JanusVLN on transformers 4.50 and DeepSpeed writes it."""


class Counted:
    """os.pread that counts, to be put in its place."""

    def __init__(self) -> None:
        self._pread = os.pread
        self.bytes = 0
        self.largest = 0

    def __call__(self, fd: int, length: int, offset: int) -> bytes:
        data = self._pread(fd, length, offset)
        self.bytes += len(data)
        self.largest = max(self.largest, len(data))
        return data


def told(*texts: str, at_s: float = 1000.0) -> Progress:
    """What is known after these parts of a log."""
    state = TrainingState()
    pieces = Pieces(cut=False)
    for text in (*texts, "\n"):
        for piece in pieces.feed(text.encode()):
            state.read(piece, at_s)
    return state.progress()

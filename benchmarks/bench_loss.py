"""What the dtype of stored features does to the loss of a small training run.

Theory. A cache of float32 features gives the losses of live training; bfloat16 rounds each value to 8 bits of mantissa
(0.2 % of it at most), int8 changes a token by about half a percent. What matters is not the feature but the loss. The
same small model is trained from one cache of each dtype, same seed, same batches, float32 arithmetic; every step's loss
is compared with the run on float32 features. Beside it, what two runs differ by that differ in nothing but the order of
their samples (another seed): a change far below that cannot be told from chance. The model is small, so this says that
nothing is broken, not that a large model cannot feel it.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import record
from janusvln.demo.compare import MeasuredRun, run_training
from janusvln.demo.tiny_qwen import write_tiny_qwen
from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.demo.dataset import write_dataset

EXACT = "float32"
DTYPES = (EXACT, "bfloat16", "int8")
LAST = 0.2
"""Of the steps: the losses at the end of a run are their mean over this part."""


def precompute(folder: Path, dtype: str) -> Path:
    cache = folder / f"cache_{dtype}"
    command = [
        sys.executable, "-m", "vggt_cache", "precompute", "--vggt_model_path", folder / "model",
        "--data_root", folder / "data", "--cache_dir", cache, "--context", "causal", "--image_size", "224",
        "--compute_dtype", "float32", "--feature_dtype", dtype, "--num_workers", "0", "--device", "cpu",
    ]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return cache


def train(folder: Path, cache: Path, *, steps: int, seed: int) -> MeasuredRun:
    flags = [
        "--model_name_or_path", folder / "qwen", "--train_data_root", folder / "data", "--vggt_cache_dir", cache,
        "--vggt_cache_miss", "error", "--max_steps", steps, "--seed", seed, "--per_device_train_batch_size", 2,
        "--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--tune_mm_llm", "True", "--tune_mm_mlp", "True",
        "--use_cpu", "True", "--disable_tqdm", "True",
    ]  # fmt: skip
    return run_training(folder / "train" / f"{cache.name}_{seed}", [str(flag) for flag in flags])


def end_loss(run: MeasuredRun) -> float:
    return statistics.mean(run.losses[-max(1, int(len(run.losses) * LAST)) :])


def relative_differences(run: MeasuredRun, exact: MeasuredRun) -> list[float]:
    return [abs(one - two) / abs(two) for one, two in zip(run.losses, exact.losses, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", episodes=2, steps=20)
        write_checkpoint(folder / "model")
        write_tiny_qwen(folder / "qwen")
        caches = {dtype: precompute(folder, dtype) for dtype in DTYPES}
        runs = {
            dtype: train(folder, cache, steps=arguments.steps, seed=42) for dtype, cache in caches.items()
        }
        other_order = train(folder, caches[EXACT], steps=arguments.steps, seed=43)
    exact = runs[EXACT]
    figures: dict[str, Any] = {
        "first_loss": exact.losses[0],
        "end_loss": end_loss(exact),
        "end_loss_of_another_order_relative": abs(end_loss(other_order) / end_loss(exact) - 1),
    }
    for dtype in DTYPES[1:]:
        differences = relative_differences(runs[dtype], exact)
        figures[dtype] = {
            "first_step_relative_difference": differences[0],
            "middle_relative_difference": statistics.median(differences),
            "largest_relative_difference": max(differences),
            "end_loss": end_loss(runs[dtype]),
            "end_loss_relative_difference": abs(end_loss(runs[dtype]) / end_loss(exact) - 1),
        }
    record.write("loss", "cpu", vars(arguments), figures)


if __name__ == "__main__":
    main()

"""The demo's second half: a tiny model trained live and from the cache, side by side.

It goes on in the directory where `vggt-cache demo` has left data, encoder and both caches.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from janusvln.demo.measured_run import MeasuredRun, run_training
from janusvln.demo.tiny_qwen import write_tiny_qwen
from vggt_cache.errors import SettingsError
from vggt_cache.identity import CONTEXTS
from vggt_cache.precompute.report import bytes_text

STEPS = 10
_SHOWN = (1, 2, 3, 5, 8, 10)


def compare(directory: str) -> None:
    """Train four times: both contexts, live and cached. Prints what was measured."""
    root = Path(directory)
    if not (root / "cache").is_dir():
        raise SettingsError(f"{directory} holds no demo yet: run `vggt-cache demo {directory}` first")
    qwen = write_tiny_qwen(root / "qwen")
    for context in CONTEXTS:
        print(
            f"\n== Train, context {context}: {STEPS} steps live, then the same {STEPS} from the cache",
            flush=True,
        )
        shutil.rmtree(root / "train" / context, ignore_errors=True)
        live = _train(root, qwen, context, cached=False)
        cached = _train(root, qwen, context, cached=True)
        _print_losses(live, cached)
        _print_speed(live, cached)


def _train(root: Path, qwen: Path, context: str, *, cached: bool) -> MeasuredRun:
    flags = ["--model_name_or_path", str(qwen), "--train_data_root", str(root / "data"), "--context", context]
    flags += [
        "--max_steps",
        str(STEPS),
        "--learning_rate",
        "1e-3",
        "--image_size",
        "224",
        "--use_cpu",
        "True",
    ]
    flags += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True", "--per_device_train_batch_size", "1"]
    if cached:
        # No path of VGGT: what is fully cached never loads it.
        flags += ["--vggt_cache_dir", str(root / "cache"), "--vggt_cache_miss", "error"]
    else:
        flags += ["--vggt_model_path", str(root / "model")]
    name = "cached" if cached else "live"
    return run_training(root / "train" / context / name, flags, {"VGGT_CACHE_DIR": ""})


def _print_losses(live: MeasuredRun, cached: MeasuredRun) -> None:
    print(f"{'step':>10} " + " ".join(f"{step:8}" for step in _SHOWN))
    for name, run in (("live", live), ("cached", cached)):
        print(f"{name:>10} " + " ".join(f"{run.losses[step - 1]:8.5f}" for step in _SHOWN))


def _print_speed(live: MeasuredRun, cached: MeasuredRun) -> None:
    largest = max(abs(a - b) / abs(a) for a, b in zip(live.losses, cached.losses, strict=True))
    print(f"{'':>10} {'s/it':>8} {'hit rate':>9} {'encode':>10} {'cache wait':>11} {'peak memory':>12}")
    for name, run in (("live", live), ("cached", cached)):
        hits, encode_ms = run.column("cache_hit_rate"), run.column("encode_ms")
        wait_ms = run.column("cache_wait_ms")
        print(
            f"{name:>10} {run.seconds_per_step:8.3f} {sum(hits) / len(hits):9.2f} "
            f"{sum(encode_ms) / len(encode_ms):7.0f} ms {sum(wait_ms) / len(wait_ms):8.2f} ms "
            f"{bytes_text(run.peak_bytes):>12}"
        )
    speed_up = live.seconds_per_step / cached.seconds_per_step
    print(f"speed-up {speed_up:.1f} x; largest relative difference between the losses {largest:.1e}")

"""`python -m janusvln.train` on the device, live and from a cache: the losses must be equal.

The models are tiny. All runs go at the same time, since what is asked for here is what they compute: steps are timed by
the step `step`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from bench_encoder import SIZES
from bench_scaling import write_model
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting
from janusvln.demo.compare import run_training
from janusvln.demo.tiny_qwen import write_tiny_qwen
from vggt_cache.demo.dataset import write_dataset
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings


def run(setting: Setting, notes: Notes) -> None:
    folder = setting.work / "training"
    folder.mkdir()
    data, model, qwen, cache = (folder / name for name in ("data", "model", "qwen", "cache"))
    write_dataset(data, episodes=1, steps=3 if setting.dry else 24)
    write_model(model, setting.config if setting.dry else SIZES["small"])
    write_tiny_qwen(qwen)
    contexts = ("causal",) if setting.dry else ("causal", "frame")
    for context in contexts:
        notes.measure(f"{context}_filled", partial(fill, setting, data, model, cache, context))
    ways = {
        "live": ["--vggt_model_path", str(model)],
        "cached": ["--vggt_cache_dir", str(cache), "--vggt_cache_miss", "error"],
    }
    common = [f"--model_name_or_path={qwen}", f"--train_data_root={data}", *flags(setting)]

    def train(context: str, way: str) -> dict[str, Any]:
        chosen = [*common, "--context", context, *ways[way]]
        done = run_training(folder / f"{context}_{way}", chosen, {"VGGT_CACHE_DIR": ""})
        return {"losses": done.losses, "cache_hit_rate": done.column("cache_hit_rate")[-1:]}

    runs = [(context, way) for context in contexts for way in ways]
    with ThreadPoolExecutor(len(runs)) as pool:
        jobs = {run: pool.submit(train, *run) for run in runs}
        found = {run: notes.measure("_".join(run), job.result) for run, job in jobs.items()}
    for context in contexts:
        live, cached = (found[context, way] for way in ways)
        if live is not None and cached is not None:
            difference = largest_difference(live["losses"], cached["losses"])
            notes.tell(f"{context}_largest_difference", difference)


def flags(setting: Setting) -> list[str]:
    """What all runs have in common beside their inputs."""
    chosen = ["--image_size", width(setting), "--min_pixels", "784", "--learning_rate", "1e-3"]
    chosen += ["--tune_mm_llm", "True", "--tune_mm_mlp", "True"]
    if setting.dry:
        return [*chosen, "--max_steps", "2", "--use_cpu", "True"]
    chosen += ["--max_steps", "10", "--bf16", "True", "--per_device_train_batch_size", "2"]
    return [*chosen, "--dataloader_num_workers", "2"]


def width(setting: Setting) -> str:
    """Of the images, in pixels."""
    return "112" if setting.dry else "224"


def fill(setting: Setting, data: Path, model: Path, cache: Path, context: str) -> int:
    """Compute all features of a context. Returns the exit code."""
    return precompute(
        PrecomputeSettings(
            data_root=str(data),
            cache_dir=str(cache),
            vggt_model_path=str(model),
            context=context,
            image_size=int(width(setting)),
            num_workers=1,
            device=setting.device.type,
        )
    )


def largest_difference(live: list[float], cached: list[float]) -> float:
    """Between losses of the same step, relative."""
    return max(abs(one - two) / abs(one) for one, two in zip(live, cached, strict=True))

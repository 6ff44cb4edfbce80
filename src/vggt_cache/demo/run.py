"""`vggt-cache demo`: data, encoder, both caches, verification and the pictures, from nothing."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.demo.dataset import write_dataset
from vggt_cache.errors import VggtCacheError
from vggt_cache.identity import CONTEXTS
from vggt_cache.inspection import draw_view
from vggt_cache.precompute.report import bytes_text
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import FeatureCache

IMAGE_SIZE = 224
"""Small, so that two cores are done in well under two minutes."""


def run_demo(directory: str) -> int:
    """Do all of it below `directory`; a second call finds everything done already. Returns the exit code."""
    root = Path(directory)
    print("== Frames: a first-person walk through textured rooms", flush=True)
    data = write_dataset(root / "data")
    print(
        f"{data.episodes} episodes, {data.frames} frames of 640x480, {data.frames} samples in each of the three "
        f"layouts, {bytes_text(data.image_bytes)} of images: {data.root}"
    )
    print("\n== Encoder: VGGT's architecture and names, small, with random weights", flush=True)
    print(write_checkpoint(root / "model"))
    rows = [_precompute_and_view(root, context) for context in CONTEXTS]
    print(f"\n== What was done ({torch.get_num_threads()} threads)")
    print("context  features   each [h, w, C]    on disk  first run    again  picture", *rows, sep="\n")
    print("\n== Go on")
    for arguments in (
        ["info", root / "cache"],
        ["verify", root / "cache", "--context", "causal", "--data_root", data.root],
    ):
        print(shlex.join([*_this_command(), *map(str, arguments)]))
    return 0


def _this_command() -> list[str]:
    """What starts this program again, also where its environment is not activated."""
    script = sys.argv[0]
    return [script] if os.path.basename(script) == "vggt-cache" else [sys.executable, "-m", "vggt_cache"]


def _precompute_and_view(root: Path, context: str) -> str:
    """Both runs and the picture; returns a line of the table at the end."""
    data, cache_dir, picture = (str(root / name) for name in ("data", "cache", f"features_{context}.png"))
    flags: dict[str, Any] = {
        "vggt_model_path": str(root / "model"),
        "data_root": data,
        "cache_dir": cache_dir,
    }
    flags |= {"context": context, "image_size": IMAGE_SIZE, "num_workers": 2, "verify": True}
    settings = PrecomputeSettings(**flags)
    seconds = []
    for title in ("Precompute, context {}", "The same command again, context {}: nothing is left to do"):
        print(f"\n== {title.format(context)}", flush=True)
        began_s = time.perf_counter()
        if exit_code := precompute(settings):
            raise VggtCacheError(f"precompute ended with exit code {exit_code}; its lines above say why")
        seconds.append(time.perf_counter() - began_s)
    print(f"\n== Picture, context {context}", flush=True)
    draw_view(cache_dir, data, picture, count=8, context=context, fingerprint=None)
    with FeatureCache.open(cache_dir, context=context) as cache:
        features, feature = len(cache), cache.get_by_key(next(iter(cache.keys())))
        store = root / "cache" / cache.spec.short_name
    assert feature is not None
    on_disk = bytes_text(sum(path.stat().st_size for path in store.rglob("*") if path.is_file()))
    shape, (first_s, again_s) = "x".join(map(str, feature.shape)), seconds
    return f"{context:8} {features:8} {shape:>16} {on_disk:>10} {first_s:8.1f} s {again_s:6.1f} s  {picture}"

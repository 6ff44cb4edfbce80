"""`vggt-cache demo`: data, encoder, both caches, verification and the pictures, from nothing."""

from __future__ import annotations

import time
from pathlib import Path

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
    print(
        f"{'context':8} {'features':>8} {'each [h, w, C]':>16} {'on disk':>10} {'first run':>10} {'again':>8}  picture"
    )
    print("\n".join(rows))
    print("\n== Go on")
    print(f"vggt-cache info {root / 'cache'}")
    print(f"vggt-cache verify {root / 'cache'} --context causal --data_root {data.root}")
    return 0


def _precompute_and_view(root: Path, context: str) -> str:
    """Both runs and the picture; returns a line of the table at the end."""
    print(f"\n== Precompute, context {context}", flush=True)
    settings = PrecomputeSettings(
        vggt_model_path=str(root / "model"),
        data_root=str(root / "data"),
        cache_dir=str(root / "cache"),
        context=context,
        image_size=IMAGE_SIZE,
        num_workers=2,
        verify=True,
    )
    first_s = _run(settings)
    print(f"\n== The same command again, context {context}: nothing is left to do", flush=True)
    again_s = _run(settings)
    print(f"\n== Picture, context {context}", flush=True)
    picture = root / f"features_{context}.png"
    draw_view(
        settings.cache_dir, settings.data_root, str(picture), count=8, context=context, fingerprint=None
    )
    with FeatureCache.open(settings.cache_dir, context=context) as cache:
        features, feature = len(cache), cache.get_by_key(next(iter(cache.keys())))
        store = root / "cache" / cache.spec.short_name
    assert feature is not None
    on_disk = bytes_text(sum(path.stat().st_size for path in store.rglob("*") if path.is_file()))
    shape = "x".join(map(str, feature.shape))
    return f"{context:8} {features:8} {shape:>16} {on_disk:>10} {first_s:8.1f} s {again_s:6.1f} s  {picture}"


def _run(settings: PrecomputeSettings) -> float:
    """Seconds that it took."""
    began_s = time.perf_counter()
    exit_code = precompute(settings)
    if exit_code:
        raise VggtCacheError(f"precompute ended with exit code {exit_code}; its lines above say why")
    return time.perf_counter() - began_s

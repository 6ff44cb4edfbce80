"""`vggt-cache demo`: data, encoder, both caches, verification and the pictures, from nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.demo.dataset import DatasetSummary, write_dataset
from vggt_cache.errors import VggtCacheError
from vggt_cache.identity import CONTEXTS
from vggt_cache.inspection import draw_view
from vggt_cache.precompute.report import bytes_text
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.store import FeatureCache

IMAGE_SIZE = 224
"""Small, so that two cores are done in well under two minutes."""


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of the table at the end."""

    context: str
    features: int
    feature_shape: tuple[int, ...]
    first_s: float
    again_s: float
    bytes_on_disk: int
    picture: Path


def run_demo(directory: str) -> int:
    """Do all of it below `directory`; a second call finds everything done already. Returns the exit code."""
    root = Path(directory)
    print("== Frames: a first-person walk through textured rooms", flush=True)
    data = write_dataset(root / "data")
    print(
        f"{data.episodes} episodes, {data.frames} frames of 640x480, {data.samples} samples in each of the three "
        f"layouts, {bytes_text(data.image_bytes)} of images: {data.root}"
    )
    print("\n== Encoder: VGGT's architecture and names, small, with random weights", flush=True)
    model = write_checkpoint(root / "model")
    print(model)
    rows = [_precompute_and_view(root, data, model, context) for context in CONTEXTS]
    _print_table(rows)
    _print_next_steps(root, data)
    return 0


def _precompute_and_view(root: Path, data: DatasetSummary, model: Path, context: str) -> _Row:
    print(f"\n== Precompute, context {context}", flush=True)
    settings = PrecomputeSettings(
        vggt_model_path=str(model),
        data_root=str(data.root),
        cache_dir=str(root / "cache"),
        context=context,
        image_size=IMAGE_SIZE,
        num_workers=2,
        verify=True,
    )
    first_s = _run(settings)
    print(f"\n== The same command again, context {context}: nothing is left to do", flush=True)
    again_s = _run(settings)
    picture = root / f"features_{context}.png"
    print(f"\n== Picture, context {context}", flush=True)
    draw_view(
        settings.cache_dir, settings.data_root, str(picture), count=8, context=context, fingerprint=None
    )
    with FeatureCache.open(settings.cache_dir, context=context) as cache:
        features = len(cache)
        feature = cache.get_by_key(next(iter(cache.keys())))
        store = Path(settings.cache_dir) / cache.spec.short_name
    assert feature is not None
    return _Row(
        context=context,
        features=features,
        feature_shape=tuple(feature.shape),
        first_s=first_s,
        again_s=again_s,
        bytes_on_disk=sum(path.stat().st_size for path in store.rglob("*") if path.is_file()),
        picture=picture,
    )


def _run(settings: PrecomputeSettings) -> float:
    began_s = time.perf_counter()
    exit_code = precompute(settings)
    if exit_code:
        raise VggtCacheError(f"precompute ended with exit code {exit_code}; its lines above say why")
    return time.perf_counter() - began_s


def _print_table(rows: list[_Row]) -> None:
    print(f"\n== What was done ({torch.get_num_threads()} threads)")
    print(
        f"{'context':8} {'features':>8} {'each [h, w, C]':>16} {'on disk':>10} {'first run':>10} {'again':>8}  picture"
    )
    for row in rows:
        shape = "x".join(map(str, row.feature_shape))
        print(
            f"{row.context:8} {row.features:8} {shape:>16} {bytes_text(row.bytes_on_disk):>10} "
            f"{row.first_s:8.1f} s {row.again_s:6.1f} s  {row.picture}"
        )


def _print_next_steps(root: Path, data: DatasetSummary) -> None:
    print("\n== Go on")
    print(f"vggt-cache info {root / 'cache'}")
    print(f"vggt-cache verify {root / 'cache'} --context causal --data_root {data.root}")

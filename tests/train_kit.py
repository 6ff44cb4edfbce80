"""Feature requests, caches and encoders for the tests of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from qwen_vl.features.live import LiveEncoder
from qwen_vl.features.read_ahead import ReadAhead
from qwen_vl.features.request import FeatureRequest
from qwen_vl.features.source import FeatureSource
from small_data import write_image
from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import PATCH_SIZE, FeatureSpec, Preprocessing, feature_key, frame_digest
from vggt_cache.store import FeatureCache

CPU = torch.device("cpu")


def small_spec(checkpoint: Path, context: str, *, feature_dtype: str = "float32") -> FeatureSpec:
    """64x48 images become a grid of 3 x 4 patches."""
    return FeatureSpec(
        encoder=Checkpoint.open(str(checkpoint)).spec("float32"),
        preprocessing=Preprocessing(image_size=56),
        context=context,
        feature_dtype=feature_dtype,
    )


def make_request(
    spec: FeatureSpec, paths: Sequence[Path], *, index: int = 0, with_frames: bool = True
) -> FeatureRequest:
    """What a DataLoader worker sends for a sample with these images."""
    used = list(paths)[-1:] if spec.context == "frame" else list(paths)
    data = [read_frame(path) for path in used]
    frames = torch.stack([torch.from_numpy(decode_frame(one, spec.preprocessing)) for one in data])
    digests = tuple(frame_digest(one) for one in data)
    _, height, width, _ = frames.shape
    return FeatureRequest(
        index=index,
        key=feature_key(spec, digests),
        paths=tuple(map(str, used)),
        digests=digests,
        grid=(height // PATCH_SIZE, width // PATCH_SIZE),
        frames=frames if with_frames else None,
    )


def write_images(root: Path, count: int) -> list[Path]:
    return [write_image(root / f"{number}.png", number) for number in range(count)]


def make_source(
    spec: FeatureSpec, cache: FeatureCache | None, checkpoint: Path | str | None, **options: object
) -> FeatureSource:
    return FeatureSource(
        cache=cache,
        reader=None if cache is None else ReadAhead(cache, CPU),
        encoder=LiveEncoder(None if checkpoint is None else str(checkpoint), spec, CPU),
        **options,  # type: ignore[arg-type]
    )

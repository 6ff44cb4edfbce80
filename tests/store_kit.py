"""Small stores, and file systems that fail on demand, for the tests of the store."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.store import FeatureCache, FileSystem, ShardWriter, create_store
from vggt_cache.store.tensors import TORCH_DTYPES

H, W = 2, 3
DAMAGE_WARNING = pytest.mark.filterwarnings("ignore:.*damaged shard:UserWarning")


def make_spec(
    *, context: str = "frame", feature_dtype: str = "bfloat16", embed_dim: int = 2, image_size: int = 518
) -> FeatureSpec:
    encoder = EncoderSpec(
        weights_digest="ab" * 32,
        embed_dim=embed_dim,
        depth=2,
        num_heads=1,
        img_size=28,
        patch_size=14,
        patch_embed="dinov2_vits14_reg",
        layer=0,
        compute_dtype="float32",
    )
    preprocessing = Preprocessing(image_size=image_size)
    return FeatureSpec(
        encoder=encoder, preprocessing=preprocessing, context=context, feature_dtype=feature_dtype
    )


SPEC = make_spec()


def make_key(number: int) -> bytes:
    return random.Random(number).randbytes(16)


def make_feature(number: int, spec: FeatureSpec = SPEC, h: int = H, w: int = W) -> torch.Tensor:
    """A feature that belongs to one number and no other."""
    generator = torch.Generator().manual_seed(number)
    shape = (h, w, spec.encoder.channels)
    return torch.randn(shape, generator=generator).to(TORCH_DTYPES[spec.feature_dtype])


def write_shard(
    cache_dir: Path,
    numbers: Iterable[int] | Mapping[int, torch.Tensor],
    spec: FeatureSpec = SPEC,
    **options: Any,
) -> str:
    """Commit the features of these numbers (or the given ones under their keys) in one shard; returns its name."""
    store_dir = create_store(cache_dir, spec)
    with ShardWriter(store_dir, spec, **options) as writer:
        for number in numbers:
            feature = numbers[number] if isinstance(numbers, Mapping) else make_feature(number, spec)
            writer.append(make_key(number), feature)
        return writer.commit()


def shards_dir(cache_dir: Path, spec: FeatureSpec = SPEC) -> Path:
    return cache_dir / spec.short_name / "shards"


def shard_path(cache_dir: Path, name: str, spec: FeatureSpec = SPEC) -> Path:
    return shards_dir(cache_dir, spec) / name


def writable_shard(
    cache_dir: Path,
    numbers: Iterable[int] | Mapping[int, torch.Tensor],
    spec: FeatureSpec = SPEC,
    **options: Any,
) -> Path:
    """The path of a new shard, which can be damaged."""
    path = shard_path(cache_dir, write_shard(cache_dir, numbers, spec, **options), spec)
    path.chmod(0o644)
    return path


def save_index(cache_dir: Path, spec: FeatureSpec = SPEC) -> Path:
    with FeatureCache.open(cache_dir, spec=spec) as cache:
        assert cache.save_index()
    return cache_dir / spec.short_name / "index" / "rows"


def temp_files(cache_dir: Path) -> list[Path]:
    return list(cache_dir.rglob(".tmp-*"))


def equal(feature: torch.Tensor | None, expected: torch.Tensor) -> bool:
    """Same bytes, dtype and shape."""
    return (
        feature is not None
        and feature.dtype == expected.dtype
        and feature.shape == expected.shape
        and torch.equal(feature.view(torch.uint8), expected.view(torch.uint8))
    )


def holds(cache: FeatureCache, numbers: Iterable[int]) -> bool:
    """Whether the cache holds exactly the features of these numbers, each as it was written."""
    wanted = {make_key(number): number for number in numbers}
    if sorted(wanted) != list(cache.keys()) or len(cache) != len(wanted):
        return False
    return all(
        equal(cache.get_by_key(key), make_feature(number, cache.spec)) for key, number in wanted.items()
    )


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_descriptor_leaks() -> Iterator[None]:
    gc.collect()  # what an earlier test left in a cycle would be closed at any moment
    before = open_descriptors()
    yield
    assert open_descriptors() == before


OPERATIONS = frozenset(
    name for name, value in vars(FileSystem).items() if callable(value) and not name.startswith("_")
)
Call = Callable[[], Any]


class TracedFileSystem(FileSystem):
    """Notes every operation, and lets `fault(operation, position, call)` decide what becomes of it."""

    def __init__(self, fault: Callable[[str, int, Call], Any] | None = None) -> None:
        self.operations: list[str] = []
        self._fault = fault or (lambda operation, position, call: call())

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in OPERATIONS:
            return method

        def traced(*args: Any, **options: Any) -> Any:
            self.operations.append(name)
            return self._fault(name, len(self.operations) - 1, lambda: method(*args, **options))

        return traced


def failing(operation: str, error: int, *, nth: int = 0, done: bool = False) -> TracedFileSystem:
    """Fails the nth call of one operation; with `done` the call takes effect all the same."""
    seen = -1

    def fault(name: str, position: int, call: Call) -> Any:
        nonlocal seen
        if name != operation:
            return call()
        seen += 1
        if seen != nth:
            return call()
        if done:
            call()
        raise OSError(error, os.strerror(error))

    return TracedFileSystem(fault)

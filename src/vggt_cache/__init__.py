"""Features of a frozen VGGT encoder: computed once, kept on disk, read back.

The names below are the stable interface. They are imported on first use, so that processes which only
decode images (precompute's workers) do not pay for importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_cache.delivery import Delivery
    from vggt_cache.errors import VggtCacheError
    from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
    from vggt_cache.pixel_cache import PixelCache
    from vggt_cache.precompute.lists import precompute
    from vggt_cache.store.cache import FeatureCache
    from vggt_cache.store.staged import Staging
    from vggt_cache.wrap.aggregator import CachedAggregator
    from vggt_cache.wrap.cached_module import CachedModule

__version__ = "0.1.0"

__all__ = [
    "CachedAggregator",
    "CachedModule",
    "Delivery",
    "EncoderSpec",
    "FeatureCache",
    "FeatureSpec",
    "PixelCache",
    "Preprocessing",
    "Staging",
    "VggtCacheError",
    "__version__",
    "precompute",
]

_HOME = {
    "CachedAggregator": "vggt_cache.wrap.aggregator",
    "CachedModule": "vggt_cache.wrap.cached_module",
    "Delivery": "vggt_cache.delivery",
    "EncoderSpec": "vggt_cache.identity",
    "FeatureCache": "vggt_cache.store.cache",
    "FeatureSpec": "vggt_cache.identity",
    "PixelCache": "vggt_cache.pixel_cache",
    "Preprocessing": "vggt_cache.identity",
    "Staging": "vggt_cache.store.staged",
    "VggtCacheError": "vggt_cache.errors",
}


def __getattr__(name: str) -> Any:
    if name == "precompute":  # which can be called, see there
        return import_module("vggt_cache.precompute")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'vggt_cache' has no attribute {name!r}")

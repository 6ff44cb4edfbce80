"""The store: immutable shards of features, and a derived index. `docs/format.md` has the bytes.

Names are imported on first use, so that looking at a cache directory does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_cache.store.cache import CacheStats, FeatureCache
    from vggt_cache.store.conversion import Converted, convert
    from vggt_cache.store.filesystem import FileSystem
    from vggt_cache.store.layout import create_store, list_stores
    from vggt_cache.store.maintenance import describe
    from vggt_cache.store.pruning import prune
    from vggt_cache.store.writer import ShardWriter

__all__ = [
    "CacheStats",
    "Converted",
    "FeatureCache",
    "FileSystem",
    "ShardWriter",
    "convert",
    "create_store",
    "describe",
    "list_stores",
    "prune",
]

_HOME = {
    "CacheStats": "cache",
    "Converted": "conversion",
    "FeatureCache": "cache",
    "FileSystem": "filesystem",
    "ShardWriter": "writer",
    "convert": "conversion",
    "create_store": "layout",
    "describe": "maintenance",
    "list_stores": "layout",
    "prune": "pruning",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vggt_cache.store.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vggt_cache.store' has no attribute {name!r}")

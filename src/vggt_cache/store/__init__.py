"""The store: immutable shards of features, and a derived index. `docs/format.md` has the bytes.

Names are imported on first use, so that looking at a cache directory does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vggt_cache.store.cache import CacheStats as CacheStats
    from vggt_cache.store.cache import FeatureCache as FeatureCache
    from vggt_cache.store.directory import create_store as create_store
    from vggt_cache.store.directory import list_stores as list_stores
    from vggt_cache.store.filesystem import FileSystem as FileSystem
    from vggt_cache.store.inventory import describe as describe
    from vggt_cache.store.upkeep import Converted as Converted
    from vggt_cache.store.upkeep import convert as convert
    from vggt_cache.store.upkeep import prune as prune
    from vggt_cache.store.upkeep import remove_store as remove_store
    from vggt_cache.store.writer import ShardWriter as ShardWriter

_HOME = {
    "CacheStats": "cache",
    "Converted": "upkeep",
    "FeatureCache": "cache",
    "FileSystem": "filesystem",
    "ShardWriter": "writer",
    "convert": "upkeep",
    "create_store": "directory",
    "describe": "inventory",
    "list_stores": "directory",
    "prune": "upkeep",
    "remove_store": "upkeep",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vggt_cache.store.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vggt_cache.store' has no attribute {name!r}")

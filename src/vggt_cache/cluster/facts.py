"""What a node says about itself, as JSON that the other nodes can compare with their own."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from vggt_cache.errors import VggtCacheError
from vggt_cache.samples import find_sources, iter_samples
from vggt_cache.store import FeatureCache, list_stores

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "vggt-feature-cache")
NONE = "not set"


@dataclass(frozen=True, kw_only=True)
class Places:
    """What the launcher's variables name on this node. Empty: not given."""

    cache_dir: str
    data_root: str
    output_dir: str
    count_samples: bool
    """Read all annotations: minutes for millions of samples."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """One node's answers: text that is equal on nodes which agree, except `host` and `address`."""

    host: str
    address: str
    """Under which the others can reach it."""
    nodes: str
    """NNODES as this node was told."""
    versions: dict[str, str]
    gpus: str
    caches: dict[str, str]
    """Fingerprint of each cache -> the set of its shards, and the number of features."""
    cache_error: str
    """Why there is no cache to compare, in one sentence; or empty."""
    data: str
    """A digest of the annotations' names and sizes, and with `count_samples` the number of samples."""


def look_around(places: Places, *, address: str, nodes: int) -> NodeFacts:
    """Ask this machine. Reads the cache's index and the names of the data, no feature and no image."""
    caches, cache_error = _caches(places.cache_dir)
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        nodes=str(nodes),
        versions=_versions(),
        gpus=_gpus(),
        caches=caches,
        cache_error=cache_error,
        data=_data(places) if places.data_root else NONE,
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available() and dist.is_nccl_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    return found


def _gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{count} x {name}" for name, count in Counter(names).items()) or "none"


def _caches(cache_dir: str) -> tuple[dict[str, str], str]:
    if not cache_dir:
        return {}, NONE
    caches = {}
    try:
        for spec in list_stores(cache_dir):
            with FeatureCache.open(cache_dir, spec=spec) as cache:
                caches[spec.fingerprint] = f"{cache.snapshot[:16]}, {len(cache)} features"
    except VggtCacheError as error:
        return {}, str(error)
    return caches, "" if caches else f"{cache_dir} holds no feature cache"


def _data(places: Places) -> str:
    try:
        # Folders below the data root would take minutes on a network mount.
        with os.scandir(places.data_root) as entries:
            listing = sorted(f"{e.name} {e.stat().st_size if e.is_file() else 'folder'}" for e in entries)
        text = f"listing {hashlib.sha256(chr(10).join(listing).encode()).hexdigest()[:16]}"
        if places.count_samples:
            samples = iter_samples(find_sources(places.data_root), on_problem=lambda problem: None)
            text = f"{sum(1 for _ in samples)} samples, {text}"
        return text
    except (OSError, VggtCacheError) as error:
        return f"cannot be read: {error}"

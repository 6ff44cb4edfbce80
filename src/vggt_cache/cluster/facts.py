"""What a node says about itself, as JSON that the other nodes can compare with their own."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

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
    """One node's answers. Each value is text that is equal on nodes which agree, except `host` and
    `address`."""

    host: str
    address: str
    """Under which the others can reach it."""
    nodes: str
    """NNODES as this node was told."""
    versions: dict[str, str]
    gpus: str
    caches: dict[str, str]
    """Fingerprint of each cache -> its snapshot: the set of its shards."""
    cache_error: str
    """Why there is no cache to compare, in one sentence; or empty."""
    entries: dict[str, int]
    """Fingerprint -> features."""
    data: str
    """A digest of the annotations' names and sizes, and with `count_samples` the number of samples."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def look_around(places: Places, *, address: str, nodes: int) -> NodeFacts:
    """Ask this machine. Reads the cache's index and the names of the data, no feature and no image."""
    snapshots, entries, cache_error = _caches(places.cache_dir)
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        nodes=str(nodes),
        versions=_versions(),
        gpus=_gpus(),
        caches=snapshots,
        cache_error=cache_error,
        entries=entries,
        data=_data(places),
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
    kinds = [f"{names.count(name)} x {name}" for name in dict.fromkeys(names)]
    return ", ".join(kinds) or "none"


def _caches(cache_dir: str) -> tuple[dict[str, str], dict[str, int], str]:
    """Snapshots and numbers of features by fingerprint, and why there are none."""
    if not cache_dir:
        return {}, {}, NONE
    snapshots, entries = {}, {}
    try:
        for spec in list_stores(cache_dir):
            with FeatureCache.open(cache_dir, spec=spec) as cache:
                snapshots[spec.fingerprint] = cache.snapshot
                entries[spec.fingerprint] = len(cache)
    except VggtCacheError as error:
        return {}, {}, str(error)
    return snapshots, entries, "" if snapshots else f"{cache_dir} holds no feature cache"


def _data(places: Places) -> str:
    if not places.data_root:
        return NONE
    try:
        digest = hashlib.sha256("\n".join(sorted(_annotations(places.data_root))).encode()).hexdigest()[:16]
        if not places.count_samples:
            return f"listing {digest}"
        samples = sum(
            1 for _ in iter_samples(find_sources(places.data_root), on_problem=lambda problem: None)
        )
        return f"{samples} samples, listing {digest}"
    except (OSError, VggtCacheError) as error:
        return f"cannot be read: {error}"


def _annotations(root: str) -> Iterator[str]:
    """Names and sizes of what lies directly in the data root; folders below it would take minutes on a
    network mount."""
    with os.scandir(root) as entries:
        for entry in entries:
            yield f"{entry.name} {entry.stat().st_size if entry.is_file() else 'folder'}"

"""The check before a run on several nodes: every node looks around, they meet, and all print the same table."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.distributed as dist

from vggt_cache.cluster.meeting import Meeting, unreachable
from vggt_cache.cluster.network import Rendezvous, local_address_towards, resolve
from vggt_cache.doctor.findings import Finding
from vggt_cache.errors import VggtCacheError
from vggt_cache.samples import iter_samples, sources_of
from vggt_cache.store import FeatureCache, list_stores

CONNECT_TIMEOUT_S = 5.0
CLOCK_TOLERANCE_S = 60.0
"""Claims of precompute expire by the clock, and logs of nodes are compared by it."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "safetensors", "vggt-feature-cache")
NONE = "not set"


@dataclass(frozen=True, kw_only=True)
class Places:
    """What the launcher's variables name on this node. Empty: not given."""

    cache_dir: str
    data_root: str
    annotation_path: str
    data_path: str
    output_dir: str
    count_samples: bool
    """Read all annotations: minutes for millions of samples."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What one node says, as JSON: text that is equal on nodes which agree, then what it found out with the others."""

    host: str
    address: str
    """Under which the others can reach it; it may differ, as `host` may."""
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
    clock_s: float = 0.0
    """Seconds since 1970 that each node read at the same moment, to some milliseconds."""
    sees_output: bool = True
    """Whether it sees the file that node 0 has just made in OUTPUT_DIR."""
    unreachable: list[int] = field(default_factory=list)
    """Ranks to which it could not open a connection."""


def check_cluster(place: Rendezvous, places: Places, *, timeout_s: float) -> list[Finding]:
    """All findings, the same on every node. Raises SettingsError or MeetingError."""
    address = local_address_towards(resolve(place.master_addr))
    own = look_around(places, address=address, nodes=place.nodes)
    with (
        Meeting(place, timeout_s=timeout_s) as meeting,
        # NCCL and gloo choose any free port, which firewalls often forbid. The kernel accepts by itself.
        socket.create_server(("", 0), backlog=place.nodes) as door,
        _marker(places.output_dir if place.node_rank == 0 else "") as made,
    ):
        doors = meeting.exchange("door", (address, door.getsockname()[1], made))
        clock_s, made = time.time(), doors[0][2]  # all have just heard the last one
        own = replace(
            own,
            clock_s=clock_s,
            sees_output=bool(made) and os.path.exists(os.path.join(places.output_dir, made)),
            unreachable=unreachable([(host, port) for host, port, _ in doors], timeout_s=CONNECT_TIMEOUT_S),
        )
        return judge([NodeFacts(**answer) for answer in meeting.exchange("facts", asdict(own))])


@contextmanager
def _marker(folder: str) -> Iterator[str]:
    """Name of a file that the other nodes can know of only from node 0, which makes it; empty where it cannot."""
    path = ""
    with suppress(OSError):
        if folder:
            os.makedirs(folder, exist_ok=True)
            handle, path = tempfile.mkstemp(prefix=".check_cluster-", dir=folder)
            os.close(handle)
    try:
        yield os.path.basename(path)
    finally:
        if path:
            os.unlink(path)


def look_around(places: Places, *, address: str, nodes: int) -> NodeFacts:
    """Ask this machine. Reads the cache's index and the names of the data, no feature and no image."""
    caches, cache_error = _caches(places.cache_dir)
    names = Counter(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        nodes=str(nodes),
        versions=_versions(),
        gpus=", ".join(f"{count} x {name}" for name, count in names.items()) or "none",
        caches=caches,
        cache_error=cache_error,
        data=_data(places) if places.data_root or places.annotation_path else NONE,
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
        listing = "\n".join(sorted(_listing(places)))
        text = f"listing {hashlib.sha256(listing.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
        if places.count_samples:
            sources = sources_of(places.data_root, places.annotation_path, places.data_path)
            samples = iter_samples(sources, on_problem=lambda problem: None)
            text = f"{sum(1 for _ in samples)} samples, {text}"
        return text
    except (OSError, VggtCacheError) as error:
        return f"cannot be read: {error}"


def _listing(places: Places) -> Iterator[str]:
    """Names and sizes of the annotations that are named, or of what lies in the data root. Raises OSError too."""
    if places.annotation_path:
        for path in sources_of(None, places.annotation_path, places.data_path).files:
            yield f"{os.path.basename(path)} {os.path.getsize(path)}"
        return
    with os.scandir(places.data_root) as entries:
        # Folders below the data root would take minutes on a network mount.
        yield from (f"{e.name} {e.stat().st_size if e.is_file() else 'folder'}" for e in entries)


_REMEDIES = {
    "nodes": "Give each node the same NNODES.",
    "connections":
        "Training opens connections between all nodes on ports that it chooses: allow them in the firewall, or set "
        "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network that the nodes share.",
    "cache fingerprint":
        "They are caches of different specifications: give each node the same VGGT_CACHE_DIR, on shared storage.",
    "cache snapshot":
        "The nodes see different shards: mount the same directory on each, or wait until precompute has ended and "
        "the mount has caught up.",
    "training data": "DATA_ROOT, or ANNOTATION_PATH, must show the same annotations on every node.",
    "output directory":
        "OUTPUT_DIR must be one directory on shared storage, because each node writes a part of every checkpoint "
        "and looks there for the one to go on from.",
    "GPUs": "Nodes with unequal GPUs wait for the slowest.",
    "clocks": "Set the clocks (chrony, ntpd): precompute's claims expire by them, and logs cannot be compared.",
}  # fmt: skip
"""What to do about a finding that is not `ok`; the others compare versions."""


def judge(facts: Sequence[NodeFacts]) -> list[Finding]:
    """One finding for each question, the same on every node; `facts` in order of rank."""
    packages = dict.fromkeys(name for node in facts for name in node.versions)
    hosts = ", ".join(f"{rank}: {node.host}" for rank, node in enumerate(facts))
    addresses = ", ".join(node.address for node in facts)
    ways = (f"node {here} to node {there}" for here, node in enumerate(facts) for there in node.unreachable)
    broken = ", ".join(ways)
    blind = ", ".join(f"node {rank}" for rank, node in enumerate(facts) if not node.sees_output)
    shared = "Every node sees what node 0 writes there."
    clocks_s = [node.clock_s for node in facts]
    apart_s = max(clocks_s) - min(clocks_s)
    far = f"{apart_s:.0f} s apart" if apart_s > CLOCK_TOLERANCE_S else ""
    return [
        _equal("nodes", [node.nodes for node in facts], shown=hosts),
        _found("connections", broken and f"none from {broken}", addresses, "Each node reaches every other."),
        *_judged_caches(facts),
        _judged_data(facts),
        _found("output directory", blind and f"not shared with {blind}", "shared", shared),
        *(_equal(name, [node.versions.get(name, "none") for node in facts]) for name in packages),
        _equal("GPUs", [node.gpus for node in facts], status="warn"),
        _found("clocks", far, f"{apart_s:.1f} s apart", "Close enough."),
    ]


def _found(name: str, fault: str, value: str, meaning: str, status: str = "fail") -> Finding:
    """`ok` with value and meaning where there is no fault; else `status` with what to do."""
    if not fault:
        return Finding(name, "ok", value, meaning)
    return Finding(name, status, fault, _REMEDIES.get(name, "Install the same version on every node."))


def _equal(name: str, values: list[str], *, shown: str = "", status: str = "fail") -> Finding:
    """`ok` with the common value, or `status` with each node's own."""
    each = "; ".join(f"node {rank}: {value}" for rank, value in enumerate(values))
    fault = each if len(set(values)) > 1 else ""
    return _found(name, fault, shown or values[0], "Equal on all nodes.", status)


def _judged_caches(facts: Sequence[NodeFacts]) -> list[Finding]:
    errors = [node.cache_error for node in facts]
    if all(error == NONE for error in errors):
        return [Finding("cache", "warn", NONE, "VGGT_CACHE_DIR is not set: every step will run VGGT live.")]
    for rank, error in enumerate(errors):
        if error:
            said = "VGGT_CACHE_DIR is not set" if error == NONE else error
            return [Finding("cache", "fail", f"none on node {rank}", f"It says: {said}.")]
    names = [" ".join(sorted(name[:16] for name in node.caches)) for node in facts]
    fingerprints = _equal("cache fingerprint", names)
    if fingerprints.status == "fail":
        return [fingerprints]
    shards = ([node.caches[name] for node in facts] for name in sorted(facts[0].caches))
    return [fingerprints, *(_equal("cache snapshot", each) for each in shards)]


def _judged_data(facts: Sequence[NodeFacts]) -> Finding:
    for rank, node in enumerate(facts):
        if node.data.startswith("cannot be read"):
            return Finding("training data", "fail", f"none on node {rank}", node.data)
    if all(node.data == NONE for node in facts):
        meaning = "Neither DATA_ROOT nor ANNOTATION_PATH is set: training needs one of them."
        return Finding("training data", "warn", NONE, meaning)
    return _equal("training data", [node.data for node in facts])

"""What must be equal on all nodes, and is not: pure comparisons of what the nodes said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vggt_cache.cluster.facts import NONE, NodeFacts
from vggt_cache.doctor.findings import Finding

CLOCK_TOLERANCE_S = 60.0
"""Claims of precompute expire by the clock, and logs of nodes are compared by it."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one node found out, in order of rank where there is a value for each node."""

    facts: Sequence[NodeFacts]
    clocks_s: Sequence[float]
    """Seconds since 1970 that each node read at the same moment, to some milliseconds."""
    sees_output: Sequence[bool]
    """Whether each node sees the file that node 0 has just made in OUTPUT_DIR."""
    unreachable: Sequence[Sequence[int]]
    """For each node the ranks to which it could not open a connection."""


def judge(report: Report) -> list[Finding]:
    """One finding for each question, the same on every node."""
    facts = report.facts
    hosts = ", ".join(f"{rank}: {node.host}" for rank, node in enumerate(facts))
    packages = dict.fromkeys(name for node in facts for name in node.versions)
    return [
        _equal("nodes", [node.nodes for node in facts], "Give each node the same NNODES.", shown=hosts),
        _reach(report),
        *_caches(facts),
        _data(facts),
        _output(report.sees_output),
        *(_equal(name, [node.versions.get(name, "none") for node in facts], _VERSION) for name in packages),
        _equal(
            "GPUs",
            [node.gpus for node in facts],
            "Nodes with unequal GPUs wait for the slowest.",
            status="warn",
        ),
        _clocks(report.clocks_s),
    ]


_VERSION = "Install the same version on every node."


def _equal(
    name: str, values: Sequence[str], otherwise: str, *, shown: str = "", status: str = "fail"
) -> Finding:
    """`ok` with the common value, or `status` with each node's own and what to do."""
    if len(set(values)) == 1:
        return Finding(name, "ok", shown or values[0], "Equal on all nodes.")
    each = "; ".join(f"node {rank}: {value}" for rank, value in enumerate(values))
    return Finding(name, status, each, otherwise)


def _reach(report: Report) -> Finding:
    broken = [
        f"node {here} to node {there}" for here, ranks in enumerate(report.unreachable) for there in ranks
    ]
    if broken:
        meaning = (
            "Training opens connections between all nodes on ports that it chooses: allow them in the "
            "firewall, or set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network that the nodes share."
        )
        return Finding("connections", "fail", f"none from {', '.join(broken)}", meaning)
    addresses = ", ".join(node.address for node in report.facts)
    return Finding("connections", "ok", addresses, "Each node reaches each other node.")


def _caches(facts: Sequence[NodeFacts]) -> list[Finding]:
    errors = [node.cache_error for node in facts]
    if all(error == NONE for error in errors):
        return [Finding("cache", "warn", NONE, "VGGT_CACHE_DIR is not set: every step will run VGGT live.")]
    for rank, error in enumerate(errors):
        if error:
            said = "VGGT_CACHE_DIR is not set" if error == NONE else error
            return [Finding("cache", "fail", f"none on node {rank}", f"It says: {said}.")]
    fingerprints = _equal(
        "cache fingerprint",
        [" ".join(sorted(name[:16] for name in node.caches)) for node in facts],
        "They are caches of different specifications: give each node the same VGGT_CACHE_DIR, on shared storage.",
    )
    if fingerprints.status == "fail":
        return [fingerprints]
    otherwise = (
        "The nodes see different shards: mount the same directory on each, or wait until precompute has ended and "
        "the mount has caught up."
    )
    return [
        fingerprints,
        *(
            _equal("cache snapshot", [node.caches[name] for node in facts], otherwise)
            for name in sorted(facts[0].caches)
        ),
    ]


def _data(facts: Sequence[NodeFacts]) -> Finding:
    for rank, node in enumerate(facts):
        if node.data.startswith("cannot be read"):
            return Finding("training data", "fail", f"none on node {rank}", node.data)
    same = "DATA_ROOT must show the same annotations on every node."
    return _equal("training data", [node.data for node in facts], same)


def _output(sees: Sequence[bool]) -> Finding:
    blind = [f"node {rank}" for rank, seen in enumerate(sees) if not seen]
    if blind:
        meaning = (
            "OUTPUT_DIR must be one directory on shared storage, because each node writes a part of every "
            "checkpoint and looks there for the one to go on from."
        )
        return Finding("output directory", "fail", f"not shared with {', '.join(blind)}", meaning)
    return Finding("output directory", "ok", "shared", "Every node sees what node 0 writes there.")


def _clocks(clocks_s: Sequence[float]) -> Finding:
    apart_s = max(clocks_s) - min(clocks_s)
    if apart_s > CLOCK_TOLERANCE_S:
        meaning = (
            "Set the clocks (chrony, ntpd): precompute's claims expire by them, and logs cannot be compared."
        )
        return Finding("clocks", "fail", f"{apart_s:.0f} s apart", meaning)
    return Finding("clocks", "ok", f"{apart_s:.1f} s apart", "Close enough.")

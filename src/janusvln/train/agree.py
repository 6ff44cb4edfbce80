"""All ranks train from the same snapshot of the same cache, or none begins."""

from __future__ import annotations

import json
import socket

from janusvln.train.ranks import Ranks
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache


def agree_on_snapshot(cache: FeatureCache, ranks: Ranks) -> FeatureCache:
    """The cache as rank 0 sees it, on every rank.

    Raises CacheAccessError, with the same sentence on every rank, where a node sees another specification, or not
    all of rank 0's shards.
    """
    names = cache.shard_names()
    own = {"host": socket.gethostname(), "fingerprint": cache.spec.fingerprint, "shards": len(names)}
    leader = json.loads(
        ranks.exchange("cache", json.dumps(own | {"names": names} if ranks.rank == 0 else own))[0]
    )
    complaint = _complaint(cache, leader, ranks.rank)
    complaints = [text for text in ranks.exchange("cache complaints", complaint) if text]
    if complaints:
        raise CacheAccessError(complaints[0])
    same = tuple(leader["names"]) == names
    return cache if same else cache.with_shards(leader["names"])


def _complaint(cache: FeatureCache, leader: dict[str, object], rank: int) -> str:
    here = f"rank {rank} on {socket.gethostname()}"
    there = f"rank 0 on {leader['host']}"
    if cache.spec.fingerprint != leader["fingerprint"]:
        return (
            f"{here} has opened a cache of specification {cache.spec.fingerprint[:16]} in {cache.cache_dir}, and "
            f"{there} one of {str(leader['fingerprint'])[:16]}: the nodes see different directories; mount the same one"
        )
    names = leader["names"]
    assert isinstance(names, list)
    unseen = set(names) - set(cache.shard_names())
    if unseen:
        return (
            f"{here} sees {len(cache.shard_names())} shards in {cache.cache_dir}, and {len(unseen)} of the "
            f"{len(names)} that {there} sees are not among them: the nodes see different directories, or a mount that "
            "has not caught up; mount the same one, or wait and start again"
        )
    return ""

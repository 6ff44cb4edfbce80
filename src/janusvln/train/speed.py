"""What the log says beside the loss: how features and samples arrive."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from janusvln.features.source import FeatureSource
from vggt_cache.store import CacheStats


class Speed:
    """Of one logging interval, over all ranks."""

    def __init__(self) -> None:
        self.steps = self.samples = 0
        self.data_s = 0.0
        """This rank's waiting for the DataLoader."""
        self._began_s: float | None = None
        self._stats_before = CacheStats()

    def begin(self) -> float:
        """The time. The first call begins the first interval: what came before was no step."""
        now_s = time.perf_counter()
        self._began_s = self._began_s or now_s
        return now_s

    def take(self, source: FeatureSource, device: torch.device) -> dict[str, float]:
        """The figures since the last call. Every rank logs at the same steps.

        `cache_wait_ms`, `encode_ms` and `slowest_rank_s` are of one optimizer step, all its micro-batches together, on
        the rank where it is longest, which all others wait for; `slowest_rank` is the one that waited longest for data,
        features and encoder. Without a cache, nothing is said of one; nor of its hit rate where no feature was needed.
        `cache_staged_rate`, where features are staged, is the share of those read that this machine's disk had.
        `features_not_stored`, where a cache is filled, is of all ranks since the run began.
        """
        counts, now_s, steps = source.take_counts(), self.begin(), max(self.steps, 1)
        elapsed_s = now_s - (self._began_s or now_s)
        own = [counts.hits, counts.misses, *self._reading(source), self.samples, source.not_stored or 0]
        own += [1e3 * counts.wait_s / steps, 1e3 * counts.encode_s / steps]
        ranks = _gathered([*own, (self.data_s + counts.wait_s + counts.encode_s) / steps], device)
        hits, misses, read_bytes, read_s, read, staged, samples, not_stored, *_ = ranks.sum(0).tolist()
        *_, wait_ms, encode_ms, slowest_s = ranks.max(0).values.tolist()
        self.steps, self.samples, self.data_s, self._began_s = 0, 0, 0.0, now_s
        logs: dict[str, float] = {}
        if source.cache is not None:
            if hits + misses:
                logs["cache_hit_rate"] = round(hits / (hits + misses), 6)
            if source.cache.staging is not None and read:
                logs["cache_staged_rate"] = round(staged / read, 6)
            logs["cache_wait_ms"] = round(wait_ms, 3)
            logs["cache_read_mb_per_s"] = round(read_bytes / read_s / 1e6, 1) if read_s else 0.0
        logs |= {
            "encode_ms": round(encode_ms, 3),
            "samples_per_s": round(samples / elapsed_s, 4) if elapsed_s else 0.0,
            "slowest_rank": int(ranks[:, -1].argmax()),
            "slowest_rank_s": round(slowest_s, 3),
        }
        if source.not_stored is not None:
            logs["features_not_stored"] = int(not_stored)
        return logs

    def _reading(self, source: FeatureSource) -> tuple[int, float, int, int]:
        """Bytes and seconds of thread time that reads took; how many features were read, and how many of a stage."""
        if source.cache is None:
            return 0, 0.0, 0, 0
        now, before = source.cache.stats, self._stats_before
        self._stats_before = now
        return (
            now.bytes_read - before.bytes_read,
            now.read_s - before.read_s,
            now.hits - before.hits,
            now.staged_hits - before.staged_hits,
        )


def _gathered(figures: list[float], device: torch.device) -> torch.Tensor:
    """[ranks, figures]"""
    own = torch.tensor(figures, dtype=torch.float32, device=device)
    if not (dist.is_available() and dist.is_initialized()):
        return own[None].cpu()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts).cpu()

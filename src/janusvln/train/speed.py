"""What the log says beside the loss: how features arrive, how fast samples go, and which rank is slowest."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from janusvln.features.source import FeatureSource


class Speed:
    """Figures of one logging interval, over all ranks. Every rank logs at the same steps."""

    def __init__(self) -> None:
        self.samples = 0
        self.data_s = 0.0
        """This rank's waiting for the DataLoader."""
        self._began_s = time.perf_counter()
        self._bytes_before = 0
        self._read_s_before = 0.0

    def take(self, source: FeatureSource, device: torch.device) -> dict[str, float]:
        """The figures since the last call.

        `cache_wait_ms` and `encode_ms` are of one micro-batch on the rank where it is longest, which all others
        wait for; `slowest_rank` is the one that waited longest for data, features and encoder. `features_not_stored`,
        where a cache is filled, is of all ranks since the run began.
        """
        counts = source.take_counts()
        read_bytes, read_s = self._reading(source)
        batches = max(counts.batches, 1)
        own_s = self.data_s + counts.wait_s + counts.encode_s
        wait_ms, encode_ms = 1e3 * counts.wait_s / batches, 1e3 * counts.encode_s / batches
        figures = [counts.hits, counts.misses, wait_ms, encode_ms, read_bytes, read_s, self.samples, own_s]
        figures.append(source.not_stored or 0)
        ranks = _gathered(figures, device)
        elapsed_s = time.perf_counter() - self._began_s
        self.samples, self.data_s, self._began_s = 0, 0.0, time.perf_counter()
        total, longest = ranks.sum(0).tolist(), ranks.max(0).values.tolist()
        asked = total[0] + total[1]
        logs = {
            "cache_hit_rate": round(total[0] / asked, 6) if asked else 0.0,
            "cache_wait_ms": round(longest[2], 3),
            "cache_read_mb_per_s": round(total[4] / total[5] / 1e6, 1) if total[5] else 0.0,
            "encode_ms": round(longest[3], 3),
            "samples_per_s": round(total[6] / elapsed_s, 4),
            "slowest_rank": int(ranks[:, 7].argmax()),
            "slowest_rank_s": round(longest[7], 3),
        }
        if source.not_stored is not None:
            logs["features_not_stored"] = int(total[8])
        return logs

    def _reading(self, source: FeatureSource) -> tuple[int, float]:
        """Bytes and seconds of thread time that reads took."""
        if source.cache is None:
            return 0, 0.0
        stats = source.cache.stats
        found = stats.bytes_read - self._bytes_before, stats.read_s - self._read_s_before
        self._bytes_before, self._read_s_before = stats.bytes_read, stats.read_s
        return found


def _gathered(figures: list[float], device: torch.device) -> torch.Tensor:
    """[ranks, figures]"""
    own = torch.tensor(figures, dtype=torch.float32, device=device)
    if not (dist.is_available() and dist.is_initialized()):
        return own[None].cpu()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return torch.stack(parts).cpu()

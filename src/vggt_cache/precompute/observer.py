"""What a run's user sees while blocks are computed."""

from __future__ import annotations

import os
from dataclasses import dataclass

from tqdm import tqdm

from vggt_cache.precompute.qwen import QwenLimits
from vggt_cache.precompute.report import Reporter, count_of, seconds_text


@dataclass
class RunObserver:
    """Turns the pipeline's news into lines and a truthful progress bar."""

    bar: tqdm[None]
    reporter: Reporter
    limits: QwenLimits | None
    waiting_said: bool = False
    elsewhere: int = 0
    """Features that turned out to be stored already."""
    waits_for: str = "the first block"
    """What the pipeline has in hand, in words."""

    def __post_init__(self) -> None:
        self._grids: set[tuple[int, int]] = set()

    def found_elsewhere(self, features: int) -> None:
        self.elsewhere += features
        self._shorten(features)

    def failed(self, features: int) -> None:
        self._shorten(features)

    def _shorten(self, features: int) -> None:
        self.bar.total = (self.bar.total or 0) - features  # drawn with the next feature that is written

    def waiting(self, blocks: int) -> None:
        if not self.waiting_said:
            self.waiting_said = True
            self.reporter.info(f"Waiting for {count_of(blocks, 'block')} that other processes are computing")

    def silence(self, seconds: float) -> None:
        """Nothing was decoded, encoded or written for so long. The run goes on waiting: a mount may come back."""
        self.reporter.warn(
            f"nothing has moved for {seconds_text(seconds)}, waiting for {self.waits_for}: other processes may take "
            f"over what this one has claimed; check its disk and device; kill -9 {os.getpid()} ends this run where "
            "another signal does not, and loses nothing that is committed"
        )

    def grid_seen(self, grid: tuple[int, int]) -> None:
        if grid in self._grids:
            return
        self._grids.add(grid)
        if self.limits and (complaint := self.limits.complaint(grid)):
            self.reporter.warn(complaint)

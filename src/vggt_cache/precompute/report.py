"""What a run tells its user: the guide's lines on stdout, the progress bar on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from vggt_cache.environment import rank_of

EXIT_OK, EXIT_INVALID, EXIT_INCOMPLETE = 0, 1, 3
"""All is well; verification found fault; some inputs could not be used (they stand in failures.jsonl)."""


class Reporter:
    """Prints `[INFO]`, `[WARN]` and `[SUCCESS]` lines without tearing the progress bar.

    Under a launcher that sets RANK, `info` is printed by rank 0 alone; warnings and results by every rank.
    """

    def __init__(self) -> None:
        """Raises SettingsError where the environment's numbers are none."""
        self.rank = rank_of("RANK", 0)
        self.world_size = rank_of("WORLD_SIZE", 1)

    def info(self, text: str) -> None:
        if self.rank == 0:
            self._line("INFO", text)

    def warn(self, text: str) -> None:
        self._line("WARN", text)

    def invalid(self, label: str, reason: str) -> None:
        """A feature that verification found fault with."""
        self.warn(f"invalid: {label}: {reason}")

    def success(self, text: str) -> None:
        self._line("SUCCESS", text)

    def _line(self, level: str, text: str) -> None:
        mark = f" [rank {self.rank}]" if self.world_size > 1 and self.rank else ""
        with tqdm.external_write_mode(file=sys.stdout):
            print(f"[{level}]{mark} {text}", flush=True)

    def bar(self, total: int, unit: str) -> tqdm[Any]:
        """The `Processing` bar; redrawn rarely where nobody watches, so that logs stay short."""
        name = f"Processing (rank {self.rank})" if self.world_size > 1 else "Processing"
        seconds = 0.2 if sys.stderr.isatty() else 5.0
        return tqdm(
            total=total, desc=name, unit=unit, mininterval=seconds, maxinterval=30.0, dynamic_ncols=True
        )


def count_of(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def bytes_text(count: float) -> str:
    """A size in the unit that suits it: `512 B`, `3.4 MiB`, `1.2 TiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def seconds_text(seconds: float) -> str:
    """A duration in words: `42 s`, `3 min 10 s`, `2 h 30 min`, `5 d 3 h`."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    if total < 48 * 3600:
        return f"{total // 3600} h {total % 3600 // 60} min"
    return f"{total // 86400} d {total % 86400 // 3600} h"

"""Trials over a real NFS: one server and two clients with kernels of their own, on this machine alone.

Even seeds speak NFS 4.1, odd ones NFS 3; mounts are hard, and attributes cached as by default. They take root and what
`lab.require` names.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trials.nfs.lab import require, run_apart


def over_nfs(name: str) -> Callable[[int, Path], int]:
    """A trial of `alone.py`, for one seed in an empty folder; returns the number of trials."""

    def one(seed: int, folder: Path) -> int:
        require()
        return int(run_apart(name, str(seed), str(folder)))

    return one

"""All measurements of one peer, in processes of their own."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peers.base import POOL, Layout, Peer
from peers.catalogue import peer_class
from peers.flipped import measure_flips
from peers.killed import measure_kills
from peers.opening import measure_opening
from peers.processes import ChildError, in_child, in_one_line
from peers.speed import measure_speed


@dataclass(frozen=True, kw_only=True)
class Settings:
    shape: tuple[int, int, int] = (35, 46, 2048)
    """[h, w, channels] of a feature."""
    features: int = 192
    per_shard: int = 41
    """Features in a shard, as precompute's 256 MiB hold."""
    batch_size: int = 8
    workers: int = 2
    """Worker processes of the peers' loaders, threads of ours, threads of the limit."""
    rounds: int = 7
    writes: int = 3
    entries: int = 100_000
    entry_shape: tuple[int, int, int] = (1, 1, 2048)
    """Of the many small entries: 4 KiB each."""
    entries_per_shard: int = 16_384
    processes: int = 3
    """That open the many entries, one after the other."""
    spawned: bool = True
    """Whether those processes are spawned; forking is quicker, and less exact about memory."""
    trials: int = 10
    """Kills."""
    trial_shape: tuple[int, int, int] = (16, 16, 2048)
    trial_features: int = 64
    trial_per_shard: int = 4
    flips: int = 20
    timeout_s: float = 1800.0
    """For each measurement of each peer."""


SMALL = Settings(
    shape=(8, 16, 1024), features=32, per_shard=8, batch_size=4, rounds=2, writes=1, entries=60,
    entries_per_shard=20, processes=1, spawned=False, trials=2, trial_shape=(4, 8, 512),
    trial_features=16, flips=4, timeout_s=30.0,
)  # fmt: skip


def measure_row(name: str, folder: Path, settings: Settings) -> dict[str, Any]:
    """The figures of one peer. A measurement that could not be made is a text that says why."""
    try:
        kind = peer_class(name)
        row: dict[str, Any] = {"version": version(kind.package), "synced": kind.synced}
    except Exception as error:  # ImportError, and whatever else the import of a package may raise
        return {"missing": in_one_line(error)}
    for what, measure in _measurements(kind, settings).items():
        row[what] = _or_why_not(measure, folder / what)
    return row


def _measurements(kind: type[Peer], settings: Settings) -> dict[str, Callable[[Path], Any]]:
    """Each is given a folder of its own."""
    large = Layout(shape=settings.shape, count=settings.features, per_commit=settings.per_shard)
    many = Layout(shape=settings.entry_shape, count=settings.entries, per_commit=settings.entries_per_shard)
    trial = Layout(
        shape=settings.trial_shape, count=settings.trial_features, per_commit=settings.trial_per_shard
    )
    few = dataclasses.replace(trial, count=POOL)

    def alone(work: Callable[..., Any], layout: Layout, **options: Any) -> Callable[[Path], Any]:
        measure = functools.partial(work, **options)
        return lambda place: in_child(kind.start_method, settings.timeout_s, measure, kind, place, layout)

    return {
        "speed": alone(
            measure_speed, large, batch_size=settings.batch_size, workers=settings.workers,
            rounds=settings.rounds, writes=settings.writes,
        ),
        "opening": lambda place: measure_opening(
            kind, place, many, processes=settings.processes, timeout_s=settings.timeout_s,
            start_method="spawn" if settings.spawned else kind.start_method,
        ),
        "killed": lambda place: measure_kills(
            kind, place, trial, trials=settings.trials, timeout_s=settings.timeout_s
        ),
        "flipped": alone(measure_flips, few, flips=settings.flips),
    }  # fmt: skip


def _or_why_not(measure: Callable[[Path], Any], place: Path) -> Any:
    place.mkdir()
    try:
        return measure(place)
    except ChildError as error:
        return str(error).replace(str(place), "...")
    finally:
        shutil.rmtree(place, ignore_errors=True)

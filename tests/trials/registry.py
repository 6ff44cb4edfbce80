"""What a trial is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """This machine cannot run the trial; the message says what it lacks."""


STORE = ("errors.py", "identity.py", "codec", "store")
PRECOMPUTE = (".",)
"""What trials of the store, and of whole runs, exercise of the package: a run goes through nearly all of it."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Run for seeds one after the other until `count` trials were done."""

    name: str
    about: str
    """What happens in one trial, for the table of results."""
    count: int
    """Trials in `run_trials.py` without `--count`."""
    file_system: str = ""
    """Where it takes place, if not in the folder that it is given."""
    exercises: Sequence[str] = STORE
    """Files and folders of the package whose change makes old figures those of another program."""
    run: Callable[[int, Path], int]
    """Run one seed in an empty folder; returns the number of trials. Raises AssertionError on a violation."""

"""What must be made anew in a child process after fork."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    def start_anew_in_child(self) -> None:
        """Replace locks: a thread that does not exist in the child may have held them."""


_ALIVE: weakref.WeakSet[Forkable] = weakref.WeakSet()


def renew_after_fork(owner: Forkable) -> None:
    """Have `owner` told in every child that is forked from now on. Does not keep it alive."""
    _ALIVE.add(owner)


def _in_child() -> None:
    for owner in list(_ALIVE):
        owner.start_anew_in_child()


os.register_at_fork(after_in_child=_in_child)

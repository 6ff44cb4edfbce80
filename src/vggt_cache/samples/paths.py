"""From a name in an annotation to the path of a file and its present state. Opens nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vggt_cache.small_files import FileState, state_of


def locate_frame(bases: Sequence[str], name: str) -> tuple[str, FileState | None]:
    """The path that `name` stands for, and the state of that file; None where there is none.

    Relative names are looked for in each of `bases` in turn. Only where a file does not exist is the next
    base tried: a folder that cannot be looked into must not change which image is meant.
    """
    for base in bases:
        path = os.path.join(base, name)
        try:
            return _found(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError):
            return path, None
    return tidy(os.path.join(bases[0], name) if bases else name), None


def tidy(path: str) -> str:
    """`path` without `.`, `//`, and `..` where removing the latter does not change what is meant.

    With a symbolic link before it, `..` leads elsewhere than the text suggests; then it stays.
    """
    short = os.path.normpath(path)
    if ".." not in path or short == path:
        return short
    try:
        return short if os.path.samefile(path, short) else path
    except (OSError, ValueError):
        return path


def _found(path: str) -> tuple[str, FileState]:
    state = state_of(os.stat(path))  # before the name is made tidy, which may look at links
    return tidy(path), state

"""From a name in an annotation to the path of a file and its present state, one or many. Opens nothing."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from vggt_cache.small_files import FileState, state_of

_T = TypeVar("_T")
_R = TypeVar("_R")


def locate_frame(bases: Sequence[str], name: str) -> tuple[str, FileState | None]:
    """The path that `name` stands for, and the state of that file; None where there is none.

    Relative names are looked for in each of `bases` in turn. Only where a file does not exist is the next
    base tried: a folder that cannot be looked into must not change which image is meant.
    """
    for base in bases:
        path = os.path.join(base, name)
        try:
            state = state_of(os.stat(path))  # before the name is made tidy, which may look at links
            return tidy(path), state
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


def map_in_order(
    pool: ThreadPoolExecutor, function: Callable[[_T], _R], items: Iterable[_T], at_most: int
) -> Iterator[_R]:
    """`map` in order with at most so many calls under way: the executor's own would start all at once."""
    waiting: deque[Future[_R]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= at_most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def parts_of(items: Iterable[_T], size: int) -> Iterator[list[_T]]:
    """Consecutive parts of `size`; the last one may be shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part

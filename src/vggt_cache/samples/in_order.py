"""Questions to the file system in several threads, answers in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


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

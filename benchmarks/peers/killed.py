"""Whether what a peer reported as kept is there after its writer was killed, and nothing else is served.

A child writes features and tells, over a pipe, each that the peer has reported as committed, and goes on when it is
told to. It gets SIGKILL, with all its children, at a random time between two of these reports, or of the whole writing
where there is but one. Then another process reads every number: a feature that was
reported and cannot be read, or reads as something else, is lost; anything that is read and is not the feature that
was written under that number is wrong, whether it was reported or not. The system stays up, so its page cache does:
this is no power loss.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from peers.base import Layout, Peer, is_feature
from peers.processes import Child, ChildError, in_child

READY, DONE = "ready", "done"


def measure_kills(
    kind: type[Peer], folder: Path, layout: Layout, *, trials: int, timeout_s: float
) -> dict[str, Any]:
    """Counts over all trials."""
    told, whole_s = write_whole(kind, folder / "whole", layout, timeout_s)
    outcomes: list[dict[str, int]] = []
    for turn in range(3 * trials):
        if len(outcomes) == trials:
            break
        place = folder / f"killed_{turn}"
        awaited = random.randrange(1, told) if told > 1 else 0
        reported = write_and_kill(
            kind, place, layout, awaited, random.uniform(0.0, whole_s / told), timeout_s
        )
        if len(reported) < layout.count:  # else it was at its end, and there was nothing to interrupt
            outcomes.append({"reported": len(reported), **look(kind, place, layout, reported, timeout_s)})
        shutil.rmtree(place, ignore_errors=True)
    return {
        "trials": trials,
        "interrupted": len(outcomes),
        "failed": sum(one["lost"] > 0 or one["wrong"] > 0 for one in outcomes),
        "with_reports": sum(one["reported"] > 0 for one in outcomes),
        "lost": sum(one["lost"] > 0 for one in outcomes),
        "wrong": sum(one["wrong"] > 0 for one in outcomes),
        "reported_features": sum(one["reported"] for one in outcomes),
        "readable_features": sum(one["readable"] for one in outcomes),
        "verdict": verdict(outcomes),
    }


def verdict(outcomes: list[dict[str, int]]) -> str:
    """`nothing`: the peer reports nothing before it has written everything, so there was nothing to keep."""
    failed = sum(one["lost"] > 0 or one["wrong"] > 0 for one in outcomes)
    tried = sum(one["reported"] > 0 or one["wrong"] > 0 for one in outcomes)
    if failed:
        return "no" if failed == tried else "partly"
    return "yes" if tried else "nothing"


# ---------------------------------------------------------------- the writer


def write_whole(kind: type[Peer], folder: Path, layout: Layout, timeout_s: float) -> tuple[int, float]:
    """How many reports there are, and how long it takes, when nobody is killed."""
    with closing_writer(kind, folder, layout, timeout_s) as child:
        began_s = time.perf_counter()
        told = take_reports(child.messages, timeout_s)
        taken_s = time.perf_counter() - began_s
    if DONE not in told:
        raise ChildError("the writer died or did not end in time")
    return len(told) - 1, taken_s


def write_and_kill(
    kind: type[Peer], folder: Path, layout: Layout, awaited: int, then_s: float, timeout_s: float
) -> set[int]:
    """Numbers that had been reported when the writer was killed, a while after so many reports."""
    with closing_writer(kind, folder, layout, timeout_s) as child:
        told = take_reports(child.messages, timeout_s, awaited)
        time.sleep(then_s)
        child.kill()
        told += take_reports(child.messages, 0.0)
    return {number for numbers in told if numbers != DONE for number in numbers}


@contextlib.contextmanager
def closing_writer(kind: type[Peer], folder: Path, layout: Layout, timeout_s: float) -> Iterator[Child]:
    child = Child(kind.start_method, write_and_tell, kind, folder, layout)
    try:
        if not child.messages.poll(timeout_s) or child.messages.recv() != READY:
            raise ChildError("the writer did not start")
        yield child
    finally:
        child.kill()


def write_and_tell(messages: Connection, kind: type[Peer], folder: Path, layout: Layout) -> None:
    def tell(numbers: Iterable[int]) -> None:
        messages.send(list(numbers))
        messages.recv()  # so that it does not run ahead of the one who is to kill it

    messages.send(READY)
    kind(folder, layout).write(tell)
    messages.send(DONE)


def take_reports(messages: Connection, seconds: float, most: int | None = None) -> list[Any]:
    """What is told until it is done or gone, the time is over, or there are so many. Each is answered."""
    told: list[Any] = []
    until_s = time.perf_counter() + seconds
    with contextlib.suppress(EOFError, OSError):
        while DONE not in told[-1:] and len(told) != most:
            if not messages.poll(max(0.0, until_s - time.perf_counter())):
                break
            told.append(messages.recv())
            messages.send(None)
    return told


# ---------------------------------------------------------------- what is left


def look(
    kind: type[Peer], folder: Path, layout: Layout, reported: Iterable[int], timeout_s: float
) -> dict[str, int]:
    """Counts of one trial. A reader that dies or hangs has read nothing."""
    try:
        readable, wrong = in_child(kind.start_method, timeout_s, read_each, kind, folder, layout)
    except ChildError:
        readable, wrong = set(), set()
    return {"readable": len(readable), "wrong": len(wrong), "lost": len(set(reported) - readable)}


def read_each(kind: type[Peer], folder: Path, layout: Layout) -> tuple[set[int], set[int]]:
    """Numbers that read as they were written, and those that read as something else."""
    peer = kind(folder, layout)
    readable, wrong = set(), set()
    peer.open()
    for number in range(layout.count):
        try:
            found = peer.read(number)
        except Exception:
            continue  # an error is an honest answer here
        if found is not None:
            (readable if is_feature(found, number, layout.shape) else wrong).add(number)
    return readable, wrong

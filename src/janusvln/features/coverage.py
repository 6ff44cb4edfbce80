"""How many of the features that a data set needs the cache has: by the content of its images, wherever they lie.

The digest table knows the images that precompute has read, by path and state. Images that were copied since, or that
are reached through a link, are read anew, as many as the start of a run has time for, in random order.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from janusvln.data.check import THREADS, FrameGrids
from vggt_cache.errors import FrameError
from vggt_cache.frames import read_frame
from vggt_cache.identity import frame_digest
from vggt_cache.precompute.digests import DigestTable
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.plan import Plan
from vggt_cache.samples.paths import map_in_order
from vggt_cache.store import FeatureCache

READING_S = 10.0
"""How long images are read for. Of larger data the rest stays unknown: it costs nothing but the knowledge."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Features that a data set needs, without those of frames that are known to be bad."""

    total: int
    present: int
    unknown: int
    """An image of theirs is not in the digest table, and was not read here either."""
    missing_passes: int = 0
    """Frame passes through the encoder that the missing and the unknown ones take, each computed once."""

    @property
    def missing(self) -> int:
        return self.total - self.present - self.unknown

    def sentence(self, noun: str) -> str:
        share = 100 * self.present / self.total if self.total else 100.0
        text = (
            f"Coverage of this data set: {self.present}/{self.total} {noun}s are in the cache ({share:.1f} %)"
        )
        if self.missing:
            text += f", {self.missing} are not"
        if self.unknown:
            text += (
                f", {self.unknown} are not known, as precompute has not read their images where they are now"
            )
        return text

    def cost(self, noun: str, *, filled: bool) -> str:
        """What it means that not all are there; empty where they are."""
        if not (absent := self.missing + self.unknown):
            return ""
        known = "" if self.missing else " (or are not known to be)"
        when = "the first epoch, and stored" if filled else "every epoch"
        return (
            f"{absent} of the {self.total} {noun}s that this data needs are not in the cache{known}: VGGT computes "
            f"them while the model waits, up to {self.missing_passes} frame passes in {when}; precompute them to save "
            "that"
        )


def measure_coverage(
    plan: Plan,
    cache: FeatureCache,
    *,
    grids: FrameGrids | None = None,
    bad_frames: dict[int, str] | None = None,
    reading_s: float = READING_S,
    say: Callable[[str], None] = lambda text: None,
) -> Coverage:
    """Where images lie as they did for precompute none is opened, and 100,000 samples take seconds.

    `grids` takes in the grids of the features that are there, `bad_frames` the frames that cannot be read, and why.
    """
    grids = FrameGrids(len(plan.frames)) if grids is None else grids
    bad_frames = {} if bad_frames is None else bad_frames
    known = KnownKeys(plan, cache.spec, DigestTable(cache.cache_dir))
    keys = [known.key(feature) for feature in range(len(plan))]
    if (unread := [feature for feature, key in enumerate(keys) if key is None]) and reading_s:
        say(
            f"Reading images of {len(unread)} {cache.spec.context_rule.noun}s that precompute has not read here"
        )
        _read(known, unread, bad_frames, time.monotonic() + reading_s)
    bad = np.zeros(len(plan.frames), np.bool_)
    bad[list(bad_frames)] = True
    present, unknown, absent = 0, 0, list[int]()
    for feature, found in enumerate(keys):
        frames, key = plan.frames_of(feature), found or known.key(feature)
        copies = [] if key is None else cache.copies_of(key)
        if copies:
            present += 1
            grids.note(frames, (copies[0][1].h, copies[0][1].w))
        elif not bad[frames].any():
            absent.append(feature)
            unknown += key is None
    passes = plan.passes(absent)[0] if absent else 0
    return Coverage(total=present + len(absent), present=present, unknown=unknown, missing_passes=passes)


def _read(known: KnownKeys, features: Sequence[int], bad_frames: dict[int, str], until_s: float) -> None:
    """Learn the digests of these features' frames until then."""
    plan = known.plan
    # Whole features in random order: what there is no time for is then no particular part of the data.
    order = random.Random(0).sample(features, len(features))

    def frames() -> Iterator[tuple[int, str]]:
        asked = set(bad_frames)
        for feature in order:
            for frame in plan.frames_of(feature).tolist():
                if time.monotonic() > until_s:
                    return
                if frame not in asked and not known.knows(frame):
                    asked.add(frame)
                    yield frame, plan.frames.paths[frame]

    with ThreadPoolExecutor(THREADS) as pool:
        for frame, digest, reason in map_in_order(pool, _digested, frames(), 4 * THREADS):
            if reason:
                bad_frames[frame] = reason
            else:
                known.learn(frame, digest)


def _digested(frame_and_path: tuple[int, str]) -> tuple[int, bytes, str]:
    """In threads."""
    frame, path = frame_and_path
    try:
        return frame, frame_digest(read_frame(path)), ""
    except FrameError as error:
        return frame, b"", str(error)

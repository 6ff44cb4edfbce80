"""`vggt_cache.precompute`: the features of frame lists that somebody's own code makes, by the loop of the command.

Lists of paths are planned together, as the command plans a data root. Frames in memory are taken in windows: a window's
lists are planned, what the store has by its pixels is passed over, and the rest is computed block by block.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vggt_cache.errors import FrameError, SettingsError
from vggt_cache.frames import read_frame
from vggt_cache.identity import PATCH_SIZE, Preprocessing, pixel_digest
from vggt_cache.pixels import pixels_of
from vggt_cache.precompute.decode import DecodedFrame, DecodePool
from vggt_cache.precompute.plan import Plan
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.run import Job
from vggt_cache.precompute.settings import PrecomputeSettings
from vggt_cache.precompute.stop import StoppedError, StopRequest
from vggt_cache.samples import Sample
from vggt_cache.small_files import FileState

WINDOW_BYTES = 2**30
"""Of the pixels that are held at a time; a list of more is a window of its own."""
_OF_THE_COMMAND = ("data_root", "annotation_path", "max_samples", "verify", "recompute", "engine")


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """What a call has done. Features that were stored before are in neither figure."""

    computed: int
    """Features that this process computed and committed."""
    failures: tuple[str, ...]
    """What could not be used, sorted: paths, and `list N` counted from 0; the reasons were told as warnings."""


def precompute(
    lists: Iterable[Iterable[Any]],
    cache_dir: str | os.PathLike[str],
    *,
    encoder: str | os.PathLike[str],
    context: str,
    reporter: Reporter | None = None,
    **settings: Any,
) -> Precomputed:
    """Compute and store the features of ordered frame lists that the cache lacks.

    `lists`: each an iterable of frames: paths; the bytes of image files and PIL images, preprocessed as files are; or
    pixels as the encoder sees them, arrays or tensors [3, H, W] or [H, W, 3], uint8 or floats in [0, 1]. A tensor
    [S, 3, H, W] is such a list. Read once, from first to last. Lists of paths alone are identified by the bytes of
    their files, all others by their pixels; who hands over pixels later finds both.
    `encoder`: a checkpoint's directory, or a hub id. `settings`: the flags of `vggt-cache precompute` by their names,
    such as `image_size`, `layers="11,17"`, `tokens`, `dry_run`; `data_path` is where relative names start from.
    Several processes may work on one cache at the same time; each goes through all of `lists`, and computes its share.
    SIGINT and SIGTERM commit what is done and raise StoppedError; the same call goes on from there.

    Raises VggtCacheError for what the caller can cure; what was committed until then stays committed.
    """
    if unfit := [name for name in _OF_THE_COMMAND if name in settings]:
        raise SettingsError(
            f"{unfit[0]} was given with lists, and is of the command alone: choose lists before they are handed over, "
            "and check a cache by vggt-cache verify"
        )
    wanted = PrecomputeSettings(
        vggt_model_path=os.fspath(encoder), cache_dir=os.fspath(cache_dir), context=context, **settings
    )
    stop = StopRequest()
    with stop.listening(), Job(wanted, reporter or Reporter()) as job:
        computed = sum(_do(job, stop, *work) for work in _plans(lists, job))
    return Precomputed(computed=computed, failures=tuple(sorted(job.reporter.failures)))


def _do(job: Job, stop: StopRequest, plan: Plan, given: GivenFrames | None) -> int:
    job.begin(plan, job.spec_of_files.of_given_pixels if given else job.spec_of_files)
    for frame, one in enumerate(given.decoded if given else ()):
        job.known.learn(frame, one.digest)
    if job.settings.dry_run:
        job.tell_what_it_takes()
    else:
        job.execute(stop)
        if stop.requested:
            raise StoppedError(stop.signal_number)
    return job.committed


def _plans(lists: Iterable[Iterable[Any]], job: Job) -> Iterator[tuple[Plan, GivenFrames | None]]:
    """Windows of frames in memory as they come, and last the lists that are files."""
    context, base = job.settings.context, os.path.abspath(job.settings.data_path or ".")
    files: list[Sample] = []
    window, held = list[_GivenList](), 0

    def plan_of_window() -> tuple[Plan, GivenFrames]:
        given = GivenFrames()
        return Plan(window, "", context, frames=given), given

    for number, frames in enumerate(_checked(lists)):
        if all(isinstance(frame, (str, os.PathLike)) for frame in frames):
            files.append(_sample(frames, number, base))
            continue
        try:
            decoded = [_decoded(frame, job.settings.preprocessing, base) for frame in frames]
        except FrameError as error:
            job.reporter.failed(f"list {number}", str(error))
            continue
        except SettingsError as error:
            raise SettingsError(f"in list {number}, counted from 0, {error}") from error
        window.append(_GivenList(number, decoded))
        held += sum(one.pixels.nbytes for one in decoded)
        if held >= WINDOW_BYTES:
            yield plan_of_window()
            window, held = [], 0
    if window:
        yield plan_of_window()
    if files:
        yield Plan(files, base, context), None


def _checked(lists: Iterable[Iterable[Any]]) -> Iterator[list[Any]]:
    for number, frames in enumerate(lists):
        if isinstance(frames, (str, bytes, os.PathLike, Image.Image)):
            raise SettingsError(
                f"list {number}, counted from 0, is a {type(frames).__name__} and no list: give an ordered list of "
                "frames, also where it is of one frame"
            )
        yield list(frames)


def _sample(frames: Sequence[str | os.PathLike[str]], number: int, base: str) -> Sample:
    names = tuple(os.fspath(frame) for frame in frames)
    return Sample(frames=names, bases=(base,), source=f"list {number}", record={}, layout="structured")


def _decoded(frame: Any, preprocessing: Preprocessing, base: str) -> DecodedFrame:
    if isinstance(frame, (str, os.PathLike)):
        frame = read_frame(os.path.join(base, frame))
    pixels = pixels_of(frame, preprocessing)
    height, width, _ = pixels.shape
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise SettingsError(
            f"a frame is given as {height} x {width} pixels, and VGGT's patches have {PATCH_SIZE}: give pixels whose "
            f"sides are multiples of {PATCH_SIZE}, as the encoder is to see them, or PIL images, which are preprocessed"
        )
    digest = pixel_digest(pixels)
    return DecodedFrame(digest=digest, pixels=pixels, pixel_digest=digest)


@dataclass(frozen=True)
class _GivenList:
    number: int
    frames: list[DecodedFrame]


@dataclass
class GivenFrames:
    """Frames in memory as pixels, each once, in the place of a plan's files."""

    decoded: list[DecodedFrame] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    """What they are called. Content too, so that the blocks of other data have other names."""
    _number_of: dict[bytes, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.decoded)

    def add(self, sample: _GivenList) -> list[int]:
        numbers = []
        for place, one in enumerate(sample.frames):
            number = self._number_of.setdefault(one.digest, len(self.decoded))
            if number == len(self.decoded):
                self.decoded.append(one)
                self.paths.append(f"list {sample.number}, frame {place} (pixels {one.digest.hex()[:16]})")
            numbers.append(number)
        return numbers

    def resolve(self) -> None:
        """There is nothing to look for."""

    def frame_ids(self) -> array[int]:
        return array("q", range(len(self.decoded)))

    def state(self, frame: int) -> FileState:
        """They are there; no file was in this state."""
        return (0, 0, 0, 0)

    def submit(self, frame: int, decoder: DecodePool) -> Callable[[], DecodedFrame]:
        return lambda: self.decoded[frame]

    def decode(self, frame: int, preprocessing: Preprocessing) -> DecodedFrame:
        return self.decoded[frame]

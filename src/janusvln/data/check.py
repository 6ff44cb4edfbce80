"""Which samples cannot be trained on, found before the first step: from texts, and from what is known of images.

One pass over the annotations and the metadata of images. Only an image that is empty or too large, or that precompute
could not use, is opened: what stands in its list may have been mended meanwhile.
"""

from __future__ import annotations

import time
from array import array
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from janusvln.data.dataset import NavigationDataset, check_history
from janusvln.data.dialogue import Dialogue, UnfitSampleError, check_dialogue, read_dialogue
from janusvln.data.tokens import text_at_most
from vggt_cache.errors import DataError, FrameError
from vggt_cache.frames import MAX_FILE_BYTES, decode_frame, read_frame
from vggt_cache.identity import PATCH_SIZE
from vggt_cache.precompute.plan import Plan
from vggt_cache.samples import Sample
from vggt_cache.samples.paths import map_in_order, parts_of

THREADS = 16
PROGRESS_S = 5.0
_SAMPLES_PER_CALL = 64

Grid = tuple[int, int]


class FrameGrids:
    """Patch grids (h, w) of those frames of which they are known: from features in the cache, or opened images."""

    def __init__(self, frames: int) -> None:
        self.numbers = np.zeros(frames, np.int32)
        """For each frame the number of its grid; 0: not known."""
        self.found: dict[Grid, int] = {}

    def note(self, frames: npt.NDArray[np.int64] | int, grid: Grid) -> None:
        self.numbers[frames] = self.found.setdefault(grid, len(self.found) + 1)


class SampleCheck:
    """Looks at all samples. `unfit` then has, by a sample's number, why it cannot be trained on: `has ...`."""

    def __init__(
        self,
        samples: Iterable[Sample],
        root: str,
        dataset: NavigationDataset,
        *,
        left_out: Collection[int] = (),
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Reads all texts. The plan is of those samples that are fit so far; nothing is said of those in `left_out`.

        `dataset` is of the same samples. `on_progress` hears every few seconds how many samples have been looked at.
        """
        self.unfit: dict[int, str] = {}
        self.count = 0
        self._dataset = dataset
        side = dataset.spec.preprocessing.image_size // PATCH_SIZE
        self._frame_at_most = dataset.pixels.image_tokens((side, side))
        """Tokens: both ways to resize leave no more."""
        self._long: dict[int, int] = {}
        """Tokens of the text of samples that could be too long, by number."""
        self._left_out, self._on_progress = set(left_out), on_progress
        self._shown = array("q")
        """The samples that the plan knows: those that name frames."""
        self.plan = Plan(self._passed_on(samples), root, dataset.spec.context)
        self.bad_frames: dict[int, str] = {}
        """Frames of the plan that cannot be used, and why."""
        self.grids = FrameGrids(len(self.plan.frames))

    def open_suspects(self, failed: Collection[str]) -> None:
        """`failed`: paths and labels of features that precompute could not use."""
        suspects = self._suspects(failed)
        paths = [self.plan.frames.paths[frame] for frame in suspects]
        with ThreadPoolExecutor(THREADS) as pool:
            opened = map_in_order(pool, self._grid_of, paths, 4 * THREADS)
            for frame, grid in zip(suspects, opened, strict=True):
                if isinstance(grid, str):
                    self.bad_frames[frame] = grid
                else:
                    self.grids.note(frame, grid)

    def judge_frames(self) -> None:
        """Which samples are unfit for their frames, as far as `bad_frames` and `grids` say by now."""
        for grid, number in self.grids.found.items():
            if complaint := self._dataset.pixels.limits.complaint(grid):
                frames = np.flatnonzero(self.grids.numbers == number).tolist()
                self.bad_frames |= dict.fromkeys(frames, complaint)
        self._blame()
        self._compare_sizes()

    def judge_lengths(self) -> list[int]:
        """Which samples are too long, as far as `grids` says by now. Returns those that still could be, longest first.

        Nothing is estimated: a sample is too long by its own tokens only.
        """
        pixels, unknown = self._dataset.pixels, dict[int, int]()
        merge = pixels.limits.merge_size
        tokens = np.zeros(len(self.grids.found) + 1, np.int64)
        for (h, w), number in self.grids.found.items():
            tokens[number] = pixels.image_tokens((h - h % merge, w - w % merge))
        for at, text in self._long.items():
            numbers = self.grids.numbers[self._frames_of(at)]
            if not numbers.all():
                unknown[at] = text + self._frame_at_most * len(numbers)
                continue
            try:
                self._dataset.check_length(text + int(tokens[numbers].sum()), len(numbers))
            except UnfitSampleError as error:
                self.unfit.setdefault(at, str(error))
        return sorted(unknown.keys() - self.unfit.keys(), key=lambda at: (-unknown[at], at))

    def _frames_of(self, at: int) -> npt.NDArray[np.int64]:
        row = bisect_left(self._shown, at)
        if row == len(self._shown) or self._shown[row] != at:
            return np.zeros(0, np.int64)
        first, last = self.plan.sample_offsets[row : row + 2]
        return self.plan.sample_frames[first:last]

    # ------------------------------------------------------------ texts

    def _passed_on(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        told_s = time.monotonic()
        with ThreadPoolExecutor(THREADS) as pool:  # descriptions of episodes are a file for each step
            parts = map_in_order(pool, self._looked_at, parts_of(samples, _SAMPLES_PER_CALL), 4 * THREADS)
            for sample, complaint, dialogue in (one for part in parts for one in part):
                number, self.count = self.count, self.count + 1
                if time.monotonic() - told_s > PROGRESS_S:
                    told_s = time.monotonic()
                    self._on_progress(self.count)
                if number in self._left_out:
                    continue
                if complaint:
                    self.unfit[number] = complaint
                    continue
                if dialogue:
                    self._measure(number, dialogue, len(sample.frames))
                if sample.frames:
                    self._shown.append(number)
                yield sample

    def _looked_at(self, samples: Sequence[Sample]) -> list[tuple[Sample, str, Dialogue | None]]:
        return [(sample, *self._complaint(sample)) for sample in samples]

    def _complaint(self, sample: Sample) -> tuple[str, Dialogue | None]:
        """And the dialogue of a sample that could be too long."""
        options, frames = self._dataset.options, len(sample.frames)
        try:
            check_history(sample, options.max_history_images)
            dialogue = read_dialogue(sample, options.section_weights)
            check_dialogue(dialogue, frames)
        except UnfitSampleError as error:
            return str(error), None
        except DataError as error:
            return f"cannot be read: {error}", None
        return "", dialogue if self._could_be_long(text_at_most(dialogue), frames) else None

    def _could_be_long(self, text: int, frames: int) -> bool:
        return text + frames * self._frame_at_most > self._dataset.options.model_max_length

    def _measure(self, number: int, dialogue: Dialogue, frames: int) -> None:
        """Here and not in threads, of which a tokenizer takes one at a time."""
        text = self._dataset.chat.text_length(dialogue, frames)
        if self._could_be_long(text, frames):
            self._long[number] = text

    # ------------------------------------------------------------ frames

    def _suspects(self, failed: Collection[str]) -> list[int]:
        frames = self.plan.frames
        states = map(frames.state, range(len(frames)))
        found = {
            frame for frame, state in enumerate(states) if not state or not 0 < state[0] <= MAX_FILE_BYTES
        }
        if failed:
            found.update(frame for frame, path in enumerate(frames.paths) if path in failed)
        if labels := {one for one in failed if one.endswith(" earlier frames)")}:  # see vggt_cache.context
            lists = (feature for feature in range(len(self.plan)) if self.plan.label(feature) in labels)
            found.update(frame for feature in lists for frame in self.plan.frames_of(feature).tolist())
        return sorted(found)

    def _grid_of(self, path: str) -> Grid | str:
        """In threads: its grid, or why it is none."""
        place = ""
        try:
            data = read_frame(path)
            place = f"{path}: "
            h, w, _ = decode_frame(data, self._dataset.spec.preprocessing).shape
        except FrameError as error:
            return f"{place}{error}"
        return h // PATCH_SIZE, w // PATCH_SIZE

    def _blame(self) -> None:
        """The samples that show bad frames."""
        bad = self.bad_frames
        frames, ends = self.plan.sample_frames, self.plan.sample_offsets[1:]
        used = np.flatnonzero(np.isin(frames, np.fromiter(bad, np.int64, len(bad))))
        for at, row in zip(used.tolist(), np.searchsorted(ends, used, "right").tolist(), strict=True):
            reason = bad[int(frames[at])]
            self.unfit.setdefault(self._shown[row], f"needs a frame that cannot be used: {reason}")

    def _compare_sizes(self) -> None:
        """A sample whose frames are known to have different grids."""
        if len(self.grids.found) < 2:
            return
        numbers, starts = self.grids.numbers[self.plan.sample_frames], self.plan.sample_offsets[:-1]
        largest = np.maximum.reduceat(numbers, starts)
        least = np.minimum.reduceat(np.where(numbers, numbers, np.iinfo(np.int32).max), starts)
        for row in np.flatnonzero((largest > least) & (largest > 0)).tolist():
            self.unfit.setdefault(
                self._shown[row], "has frames of different sizes: give the frames of a sample one size"
            )

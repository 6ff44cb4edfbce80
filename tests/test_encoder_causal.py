"""Sharing changes what is computed how often, never what comes out."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

import golden_recipe
from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.encoder.causal import CausalStats, encode_lists
from vggt_cache.encoder.history import evenly
from vggt_cache.errors import FrameError

Lists = Sequence[Sequence[int]]
GRID = (4, 5)
EPISODE = [np.linspace(0, step, min(step + 1, 9)).astype(int).tolist() for step in range(60)]
"""What a 60-step episode asks for: at every step at most nine frames up to the current one."""


def distinct_prefixes(lists: Lists) -> int:
    return len({tuple(frames[: depth + 1]) for frames in lists for depth in range(len(frames))})


class TraceHistory:
    """Which frame stands at which place of each row."""

    def __init__(self, grid: tuple[int, int], rows: int, frames: int) -> None:
        self.grid = grid
        self.rows: list[list[int | None]] = [[None] * frames for _ in range(rows)]
        self.copied = 0

    def copy(self, source: int, target: int, frames: int) -> None:
        self.rows[target][:frames] = self.rows[source][:frames]
        self.copied += frames


class TraceEncoder:
    """Stands in for the encoder; its 'feature' is the list of frames seen, so sharing can be checked exactly."""

    def __init__(self) -> None:
        self.towers: list[list[int]] = []
        self.steps: list[tuple[int, list[int]]] = []
        """Depth and rows of each."""
        self.histories: weakref.WeakSet[TraceHistory] = weakref.WeakSet()
        self.most_frames = 0
        self.copied = 0

    def patch_tokens(self, pixels: Tensor) -> Tensor:
        frames = pixels[:, 0, 0, 0].tolist()
        self.towers.append(frames)
        grid = pixels.shape[1] // 14, pixels.shape[2] // 14
        return torch.tensor(frames, dtype=torch.float32)[:, None, None, None].repeat(1, *grid, 1)

    def new_history(self, grid: tuple[int, int], *, rows: int, frames: int) -> TraceHistory:
        assert not self.histories
        history = TraceHistory(grid, rows, frames)
        self.histories.add(history)
        self.most_frames = max(self.most_frames, rows * frames)
        return history

    def extend(
        self,
        tokens: Tensor,
        history: TraceHistory | None,
        rows: list[int],
        place: int,
        *,
        want_feature: list[bool],
    ) -> Tensor | None:
        assert rows == sorted(set(rows))
        assert len(rows) == len(tokens) == len(want_feature)
        self.steps.append((place, rows))
        seen: list[list[Any]] = [[frame] for frame in tokens[:, 0, 0, 0].tolist()]
        if history is not None:
            assert history.grid == tokens.shape[1:3]
            self.copied, history.copied = self.copied + history.copied, 0
            for row, own in zip(rows, seen, strict=True):
                history.rows[row][place] = own[0]
            seen = [history.rows[row][: place + 1] for row in rows]
        wanted = [torch.tensor(frames) for frames, want in zip(seen, want_feature, strict=True) if want]
        return torch.stack(wanted) if wanted else None


def pixels_of(frame: Hashable) -> Tensor:
    assert isinstance(frame, int)
    return torch.full((14 * GRID[0], 14 * GRID[1], 3), frame, dtype=torch.uint8)


def run(
    encoder: Any,
    lists: Lists,
    batch_size: int,
    pixels: Callable[[Hashable], Tensor] = pixels_of,
    **options: Any,
) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for position, feature in encode_lists(encoder, lists, pixels, batch_size=batch_size, **options):
        assert position not in found
        found[position] = feature
    return found


any_lists = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), max_size=12)


@hypothesis.given(any_lists, st.integers(1, 5))
@hypothesis.settings(max_examples=150, derandomize=True)
def test_every_list_gets_the_feature_of_exactly_its_own_frames(lists: Lists, batch_size: int) -> None:
    found = run(TraceEncoder(), lists, batch_size)
    assert {position: feature.tolist() for position, feature in found.items()} == dict(enumerate(lists))


@hypothesis.given(any_lists, st.integers(1, 5))
@hypothesis.settings(max_examples=150, derandomize=True)
def test_each_prefix_and_each_image_is_computed_once(lists: Lists, batch_size: int) -> None:
    encoder, stats = TraceEncoder(), CausalStats()
    asked: Counter[Hashable] = Counter()

    def pixels(frame: Hashable) -> Tensor:
        asked[frame] += 1
        return pixels_of(frame)

    run(encoder, lists, batch_size, pixels, stats=stats)
    prefixes = distinct_prefixes(lists)
    frames = {frame for one in lists for frame in one}
    assert stats == CausalStats(
        tower_passes=len(frames), frame_passes=prefixes, unshared_passes=sum(map(len, lists))
    )
    assert sum(len(rows) for _, rows in encoder.steps) == prefixes
    assert sorted(frame for batch in encoder.towers for frame in batch) == sorted(frames)
    assert asked == Counter(frames)


@hypothesis.given(any_lists, st.integers(1, 5))
@hypothesis.settings(max_examples=150, derandomize=True)
def test_memory_is_bounded_and_all_of_it_is_dropped(lists: Lists, batch_size: int) -> None:
    encoder = TraceEncoder()
    run(encoder, lists, batch_size)
    longest = max(map(len, lists), default=0)
    assert encoder.most_frames <= batch_size * (longest if longest > 1 else 0)
    assert len(encoder.histories) == 0
    assert all(len(rows) <= batch_size for _, rows in encoder.steps)


def test_an_episode_takes_the_expected_passes_in_well_filled_batches() -> None:
    encoder, stats = TraceEncoder(), CausalStats()
    run(encoder, EPISODE, 8, stats=stats)
    assert stats.unshared_passes == 504
    assert stats.frame_passes == distinct_prefixes(EPISODE) < 504 / 1.5
    assert stats.tower_passes == 60
    assert [len(batch) for batch in encoder.towers] == [8] * 7 + [4]
    assert encoder.most_frames == 8 * 9
    # Sixty steps of every list alone would be 504; well under half a batch on average would waste the device.
    assert stats.frame_passes / len(encoder.steps) > 4


@pytest.mark.parametrize("batch_size", [1, 8, 16])
def test_an_episode_copies_nearly_no_history_and_attends_in_place(batch_size: int) -> None:
    """Frames put together anew for every frame's attention would be over seventeen hundred."""
    encoder = TraceEncoder()
    run(encoder, EPISODE, batch_size)
    assert encoder.copied <= {1: 0, 8: 40, 16: 60}[batch_size]
    assert all(evenly(rows) is not None for _, rows in encoder.steps)


def test_patch_tokens_are_dropped_after_their_last_use() -> None:
    kept_bytes: list[int] = []

    class Watching(TraceEncoder):
        def extend(self, *args: Any, **options: Any) -> Tensor | None:
            shape = (*GRID, 1)
            tokens = [one for one in gc.get_objects() if type(one) is Tensor and one.shape == shape]
            kept_bytes.append(
                sum({one.data_ptr(): one.untyped_storage().nbytes() for one in tokens}.values())
            )
            return super().extend(*args, **options)

    run(Watching(), [[number, 100 + number] for number in range(60)], 4)
    bytes_of_one = 4 * GRID[0] * GRID[1]
    assert bytes_of_one <= min(kept_bytes)
    assert max(kept_bytes) <= 2 * 4 * bytes_of_one


# ---------------------------------------------------------------- what cannot be computed


def mixed(frame: Hashable) -> Tensor:
    """Frames from 10 on have another size; frame 7 cannot be read."""
    assert isinstance(frame, int)
    if frame == 7:
        raise FrameError("frame 7 cannot be read")
    image = pixels_of(frame)
    return image.transpose(0, 1) if frame >= 10 else image


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_lists_may_have_other_sizes_than_their_neighbours(batch_size: int) -> None:
    encoder, lists = TraceEncoder(), [[1, 2], [10, 11], [1, 2, 3], [11], [1]]
    found = run(encoder, lists, batch_size, mixed)
    assert [found[position].tolist() for position in range(len(lists))] == lists
    assert len(encoder.histories) == 0


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize(
    ("lists", "reason"),
    [
        ([[7]], "frame 7 cannot be read"),
        ([[1, 2], [1, 2, 7, 3]], "frame 7 cannot be read"),
        ([[1, 10]], "4 x 5"),
        ([[1, 2], [1, 10, 2]], "not defined for lists of mixed image sizes"),
        ([[10, 2], [10, 11]], "not defined for lists of mixed image sizes"),
    ],
)
def test_a_list_that_cannot_be_computed_is_refused(lists: Lists, reason: str, batch_size: int) -> None:
    encoder = TraceEncoder()
    with pytest.raises(FrameError, match=reason) as caught:
        run(encoder, lists, batch_size, mixed)
    assert len(encoder.histories) == 0, caught  # while somebody holds the error


@pytest.mark.parametrize(
    ("lists", "batch_size", "reason"), [([[1], []], 2, "list 1 has no"), ([[1]], 0, "batch_size")]
)
def test_calls_without_meaning_are_refused(lists: Lists, batch_size: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run(TraceEncoder(), lists, batch_size)


# ---------------------------------------------------------------- with the real encoder


@pytest.fixture(scope="module")
def encoder(small_checkpoint: Path) -> Encoder:
    return Checkpoint.open(str(small_checkpoint)).load()


def real_pixels(frame: Hashable) -> Tensor:
    assert isinstance(frame, int)
    return golden_recipe.image(41, 14 * GRID[0], 14 * GRID[1], frame)


def alone(encoder: Encoder, frames: Sequence[int]) -> Tensor:
    history = encoder.new_history(GRID, rows=1, frames=len(frames))
    for place, frame in enumerate(frames):
        tokens = encoder.patch_tokens(real_pixels(frame)[None])
        features = encoder.extend(tokens, history, [0], place, want_feature=[True])
    assert features is not None
    return features[0]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_features_equal_those_of_each_list_computed_alone(encoder: Encoder, batch_size: int) -> None:
    lists = [[0, 1, 2], [0, 1], [0, 0, 0, 3], [1], [0, 1, 3], [0, 1, 2], [4, 1, 2], [0]]
    found = run(encoder, lists, batch_size, real_pixels)
    for position, frames in enumerate(lists):
        assert found[position].shape == (*GRID, 768)
        assert (found[position] - alone(encoder, frames)).abs().max() < 1e-5, frames


def test_a_list_of_one_frame_gives_the_feature_of_the_single_image(encoder: Encoder) -> None:
    found = run(encoder, [[5]], 4, real_pixels)
    assert (found[0] - encoder.frame_features(real_pixels(5)[None])[0]).abs().max() < 1e-5

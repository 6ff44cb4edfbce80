"""Evaluation's features: the first 8 and the last 48 earlier frames, each with the history of its own time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.model.streaming import StreamingFeatures, place_of
from model_kit import CHANNELS, generate_from_frames, images, load, prompt, rows
from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.errors import FrameError, SettingsError

GRID = (1, 2)
EPISODE = 62


@pytest.fixture(scope="module")
def encoder(small_checkpoint: Path) -> Encoder:
    return Checkpoint.open(str(small_checkpoint)).load()


@pytest.fixture(scope="module")
def frames() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (GRID[0] * 14, GRID[1] * 14, 3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for _ in range(EPISODE)]


@pytest.fixture(scope="module")
def streamed(encoder: Encoder, frames: list[Tensor]) -> list[Tensor]:
    stream = StreamingFeatures(encoder)
    return [stream.push(frame) for frame in frames]


Kept = list[Tensor]
"""Keys and values of one frame, per pair."""


def step(encoder: Encoder, frame: Tensor, earlier: list[Kept]) -> tuple[Tensor, Kept]:
    """The feature of `frame` after `earlier`, oldest first, in a history made for it alone."""
    place = len(earlier)
    history = encoder.new_history(GRID, rows=1, frames=place + 1)
    for number, kept in enumerate(earlier):
        for pair, values in enumerate(kept):
            history._pairs[pair][:, :, number] = values
    tokens = encoder.patch_tokens(frame[None])
    features = encoder.extend(tokens, history, [0], place, want_feature=[True])
    assert features is not None
    return features[0], [pair[:, :, place].clone() for pair in history._pairs]


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_up_to_56_earlier_frames_it_is_the_causal_feature_of_all_frames_so_far(
    encoder: Encoder, frames: list[Tensor], streamed: list[Tensor]
) -> None:
    ends = [0, 1, 8, 9, 47, 55, 56, 57, 61]
    lists = [range(end + 1) for end in ends]
    whole = dict(encode_lists(encoder, lists, lambda index: frames[int(str(index))], batch_size=1))
    for position, end in enumerate(ends):
        assert streamed[end].shape == (*GRID, 768)
        if end <= 56:
            assert difference(streamed[end], whole[position]) < 1e-5, end
        else:
            # Frame 57 is the first that does not see all: frame 8 was dropped after frame 56.
            assert difference(streamed[end], whole[position]) > 1e-4, end


def test_after_that_it_sees_the_first_8_and_the_last_48_with_the_history_of_their_own_time(
    encoder: Encoder, frames: list[Tensor], streamed: list[Tensor]
) -> None:
    kept: dict[int, Kept] = {}
    for now, frame in enumerate(frames):
        earlier = list(range(now))
        seen = earlier if now <= 56 else [*range(8), *range(now - 48, now)]
        expected, kept[now] = step(encoder, frame, [kept[index] for index in seen])
        assert difference(streamed[now], expected) < 1e-5, now
    as_list = dict(
        encode_lists(
            encoder, [[*range(8), *range(13, 62)]], lambda index: frames[int(str(index))], batch_size=1
        )
    )
    assert difference(streamed[61], as_list[0]) > 1e-5


def test_the_places_hold_the_first_8_and_the_last_48_and_the_new_one() -> None:
    places: dict[int, int] = {}
    for number in range(200):
        places[place_of(number)] = number
        latest = range(max(8, number - 48), number + 1)
        assert sorted(places.values()) == [*range(min(8, number + 1)), *latest], number
        assert sorted(places) == list(range(len(places)))


def test_memory_grows_with_the_episode_up_to_57_frames(encoder: Encoder, frames: list[Tensor]) -> None:
    stream = StreamingFeatures(encoder)
    room = []
    for frame in frames:
        stream.push(frame)
        assert stream._history is not None
        room.append(stream._history.frames)
    assert sorted(set(room)) == [8, 16, 32, 57]
    assert all(number < frames for number, frames in enumerate(room[:57]))


def test_a_new_episode_knows_nothing_of_the_last(encoder: Encoder, frames: list[Tensor]) -> None:
    stream = StreamingFeatures(encoder)
    first = stream.push(frames[0])
    second = stream.push(frames[0])
    stream.reset()
    assert torch.equal(stream.push(frames[0]), first)
    assert not torch.equal(first, second)


def test_in_frame_context_every_frame_is_alone(encoder: Encoder, frames: list[Tensor]) -> None:
    stream = StreamingFeatures(encoder, context="frame")
    for frame in frames[:3]:
        assert torch.equal(stream.push(frame), encoder.frame_features(frame[None])[0])
    with pytest.raises(SettingsError, match="'both', which is not one of frame, causal, joint"):
        StreamingFeatures(encoder, context="both")


def test_frames_of_another_size_are_refused_and_the_episode_can_go_on(
    encoder: Encoder, frames: list[Tensor]
) -> None:
    stream, other = StreamingFeatures(encoder), StreamingFeatures(encoder)
    for both in (stream, other):
        both.push(frames[0])
    # The same number of patches the other way round: the reference goes on with wrong positions.
    with pytest.raises(FrameError, match="2 x 1 patches") as caught:
        stream.push(frames[1].transpose(0, 1).contiguous())
    assert "1 x 2" in str(caught.value)
    assert torch.equal(stream.push(frames[1]), other.push(frames[1]))


def test_generating_from_frames_takes_the_feature_of_the_last_one(encoder: Encoder, tmp_path: Path) -> None:
    model = load(write_tiny_qwen(tmp_path), spatial_channels=768, lam=5.0)
    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8, generator=generator) for _ in range(3)]
    grid = (2, 2)
    inputs: dict[str, Any] = {**rows(prompt(grid, grid)), **images(grid, grid)}
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    stream = StreamingFeatures(encoder)
    whole = generate_from_frames(model, stream, pictures, **inputs, **options)
    stream.reset()
    features = [stream.push(picture) for picture in pictures]
    assert torch.equal(whole, model.generate(**inputs, spatial_features=features[-1:], **options))
    # One frame at a time, as an episode runs: the stream remembers the earlier ones.
    stream.reset()
    for picture in pictures:
        answer = generate_from_frames(model, stream, [picture], **inputs, **options)
    assert torch.equal(whole, answer)
    assert CHANNELS != 768

"""What a feature does not depend on (batch, neighbours, shared prefix, caller's settings), and what bfloat16 costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import golden_recipe
from vggt_cache.encoder import Checkpoint, Encoder, FrameCache
from vggt_cache.errors import FrameError, SettingsError

ROUNDING = 1e-5
GRID = (6, 9)


@pytest.fixture(scope="module")
def encoder(small_checkpoint: Path) -> Encoder:
    return Checkpoint.open(str(small_checkpoint)).load()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """uint8 [5, 84, 126, 3]."""
    return torch.stack([golden_recipe.image(seed, 84, 126) for seed in range(31, 36)])


@pytest.fixture(scope="module")
def alone(encoder: Encoder, images: Tensor) -> Tensor:
    return torch.cat([encoder.frame_features(image[None]) for image in images])


def append(
    encoder: Encoder, images: Tensor, prefixes: list[list[FrameCache]]
) -> tuple[Tensor, list[FrameCache]]:
    """One step of all branches: features [b, h, w, 2C] and caches."""
    want = [True] * len(images)
    tokens = encoder.patch_tokens(images)
    features, caches = encoder.extend(tokens, GRID, prefixes, want_feature=want, want_cache=want)
    assert features is not None
    return features, [cache for cache in caches if cache is not None]


def last_feature(encoder: Encoder, frames: Tensor) -> Tensor:
    """The feature [h, w, 2C] of the last of `frames`, computed frame by frame with nothing shared."""
    prefix: list[FrameCache] = []
    for frame in frames:
        features, caches = append(encoder, frame[None], [prefix])
        prefix.append(caches[0])
    return features[0]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_a_feature_is_the_patch_grid_with_both_halves(alone: Tensor) -> None:
    assert alone.shape == (5, *GRID, 2 * 384)
    assert alone.dtype == torch.float32


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4], [3, 3, 0], [4, 2, 1, 0], [1]])
def test_any_batch_and_any_position_give_the_feature_computed_alone(
    encoder: Encoder, images: Tensor, alone: Tensor, order: list[int]
) -> None:
    assert (encoder.frame_features(images[order]) - alone[order]).abs().max() < ROUNDING


def test_a_shared_prefix_gives_the_feature_computed_alone(encoder: Encoder, images: Tensor) -> None:
    """Branches [0, 1, 2], [0, 1, 3] and [0, 4, 2] from one cache of frame 0 and one of prefix [0, 1]."""
    _, first = append(encoder, images[:1], [[]])
    _, second = append(encoder, images[[1, 4]], [first, first])
    prefixes = [[first[0], second[0]], [first[0], second[0]], [first[0], second[1]]]
    features, _ = append(encoder, images[[2, 3, 2]], prefixes)
    for feature, order in zip(features, ([0, 1, 2], [0, 1, 3], [0, 4, 2]), strict=True):
        assert (feature - last_feature(encoder, images[order])).abs().max() < ROUNDING


def test_order_and_repetition_of_frames_matter(encoder: Encoder, images: Tensor) -> None:
    orders = ([0, 1, 2], [1, 0, 2], [0, 2], [0, 0, 2], [2])
    features = [last_feature(encoder, images[order]) for order in orders]
    for i, one in enumerate(features):
        for other in features[:i]:
            assert error(one, other) > 1e-3


def test_what_is_not_wanted_is_neither_returned_nor_computed(
    encoder: Encoder, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished: list[int] = []
    last = encoder.global_blocks[-1]
    finish = last.finish
    monkeypatch.setattr(last, "finish", lambda x, *qkv: finished.append(len(x)) or finish(x, *qkv))
    tokens = encoder.patch_tokens(images[:3])

    def run(
        want_feature: list[bool], want_cache: list[bool]
    ) -> tuple[Tensor | None, list[FrameCache | None]]:
        return encoder.extend(tokens, GRID, [[]] * 3, want_feature=want_feature, want_cache=want_cache)

    everything, _ = run([True] * 3, [False] * 3)
    some, caches = run([False, True, False], [True, False, True])
    none, _ = run([False] * 3, [True] * 3)
    nothing = run([False] * 3, [False] * 3)
    assert finished == [3, 1]
    assert [cache is None for cache in caches] == [False, True, False]
    assert none is None
    assert nothing == (None, [None] * 3)
    assert everything is not None
    assert some is not None
    assert (some[0] - everything[1]).abs().max() < ROUNDING


def test_a_cache_is_one_tensor_of_the_frame_alone(encoder: Encoder, images: Tensor) -> None:
    _, caches = append(encoder, images[:2], [[], []])
    pairs, tokens = encoder.layer + 1, 5 + GRID[0] * GRID[1]
    assert caches[0].keys_values.shape == (pairs, 2, tokens, 6, 64)
    assert caches[0].keys_values.untyped_storage().nbytes() == pairs * 2 * tokens * 384 * 4


def test_a_prefix_of_another_grid_is_refused(encoder: Encoder, images: Tensor) -> None:
    """Even with equal token counts: there the published code runs on, and is wrong."""
    _, caches = append(encoder, images[:1], [[]])
    turned = images[1].transpose(0, 1)[None]
    with pytest.raises(FrameError, match=r"9 x 6 patches .* 6 x 9: .* use images of one size in a list"):
        encoder.extend(
            encoder.patch_tokens(turned), (9, 6), [caches], want_feature=[True], want_cache=[False]
        )


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 28, 28, 3),
        torch.zeros(28, 28, 3, dtype=torch.uint8),
        torch.zeros(1, 28, 30, 3, dtype=torch.uint8),
    ],
    ids=["float", "no batch", "no multiple of 14"],
)
def test_pixels_of_another_kind_are_refused(encoder: Encoder, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        encoder.frame_features(pixels)


def set_backend_precision(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


SETTINGS: dict[str, tuple[Callable[[Any], None], object, object]] = {
    "default dtype": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "matmul precision": (torch.set_float32_matmul_precision, "medium", "highest"),
    "backend precision": (set_backend_precision, "bf16", "none"),
}
"""What a training loop may have set, and the default."""


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_the_caller_change_no_feature_and_stay(
    small_checkpoint: Path, images: Tensor, alone: Tensor, kind: str
) -> None:
    if kind == "backend precision" and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has one setting for all backends")
    put, value, usual = SETTINGS[kind]
    matrix = torch.rand(512, 512, generator=torch.Generator().manual_seed(0))
    put(value)
    try:
        encoder = Checkpoint.open(str(small_checkpoint)).load()
        product = matrix @ matrix
        assert torch.equal(encoder.frame_features(images[:1]), alone[:1])
        assert torch.equal(matrix @ matrix, product)
    finally:
        put(usual)


def test_autocast_of_the_caller_changes_no_feature(encoder: Encoder, images: Tensor, alone: Tensor) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.frame_features(images[:1]), alone[:1])


def test_features_can_enter_a_model_that_is_trained(encoder: Encoder, images: Tensor) -> None:
    feature = encoder.frame_features(images[:1])
    weight = torch.ones(feature.shape[-1], requires_grad=True)
    (feature @ weight).sum().backward()
    assert weight.grad is not None
    assert not feature.requires_grad
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_other_weights_in_the_same_encoder_are_used(small_checkpoint: Path, images: Tensor) -> None:
    """Nothing that was made of the old weights is kept."""
    encoder = Checkpoint.open(str(small_checkpoint), layer=0).load()
    before = encoder.patch_tokens(images[:1])
    weights = {name: weight.clone() for name, weight in encoder.state_dict().items()}
    weights["patch_embed.pos_embed"] += 1
    encoder.load_state_dict(weights)
    fresh = Encoder(encoder.config, layer=0)
    fresh.load_state_dict(weights)
    assert torch.equal(encoder.patch_tokens(images[:1]), fresh.patch_tokens(images[:1]))
    assert not torch.equal(encoder.patch_tokens(images[:1]), before)


def test_bfloat16_is_within_one_and_a_half_percent_of_float32(
    encoder: Encoder, small_checkpoint: Path, images: Tensor, alone: Tensor
) -> None:
    low = Checkpoint.open(str(small_checkpoint)).load(compute_dtype="bfloat16")
    features = low.frame_features(images)
    assert features.dtype == torch.float32
    assert 1e-4 < error(features, alone) < 0.015
    sequence = images[[0, 1, 2]]
    assert error(last_feature(low, sequence), last_feature(encoder, sequence)) < 0.015


def test_bfloat16_holds_matrices_only_and_keeps_keys_small(small_checkpoint: Path, images: Tensor) -> None:
    low = Checkpoint.open(str(small_checkpoint)).load(compute_dtype="bfloat16")
    for name, weight in low.state_dict().items():
        is_matrix = any(part in name for part in ("qkv", ".proj.", "fc1", "fc2"))
        assert weight.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
    _, caches = append(low, images[:1], [[]])
    assert caches[0].keys_values.dtype == torch.bfloat16


def test_an_unknown_compute_dtype_is_refused(encoder: Encoder) -> None:
    with pytest.raises(SettingsError, match=r"compute_dtype is 'float16'.*bfloat16"):
        Encoder(encoder.config, compute_dtype="float16")

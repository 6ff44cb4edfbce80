"""What a feature does not depend on (batch, neighbours, shared prefix, caller's settings), and what bfloat16 costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import golden_recipe
from vggt_cache.encoder import Checkpoint, Encoder, History, numerics
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.encoder.numerics import own_numerics
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
    encoder: Encoder, images: Tensor, history: History, place: int, rows: Sequence[int] = (0,)
) -> Tensor:
    """One step of all branches: features [b, h, w, 2C]."""
    tokens = encoder.patch_tokens(images)
    want = [True] * len(images)
    features = encoder.extend(tokens, history, rows, place, want_feature=want)
    assert features is not None
    return features


def last_feature(encoder: Encoder, frames: Tensor) -> Tensor:
    """The feature [h, w, 2C] of the last of `frames`, computed frame by frame with nothing shared."""
    history = encoder.new_history(GRID, rows=1, frames=len(frames))
    for place, frame in enumerate(frames):
        features = append(encoder, frame[None], history, place)
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


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2, 4], [0, 2, 3]], ids=["together", "even", "uneven"])
def test_a_shared_prefix_gives_the_feature_computed_alone(
    encoder: Encoder, images: Tensor, rows: list[int]
) -> None:
    """Branches [0, 1, 2], [0, 1, 3] and [0, 4, 2] from one pass of frame 0 and one of prefix [0, 1]."""
    history = encoder.new_history(GRID, rows=5, frames=4)
    one, two, three = rows
    append(encoder, images[:1], history, 0, [one])
    history.copy(one, three, 1)
    append(encoder, images[[1, 4]], history, 1, [one, three])
    history.copy(one, two, 2)
    features = append(encoder, images[[2, 3, 2]], history, 2, rows)
    for feature, order in zip(features, ([0, 1, 2], [0, 1, 3], [0, 4, 2]), strict=True):
        assert (feature - last_feature(encoder, images[order])).abs().max() < ROUNDING


def test_a_row_can_be_used_again_from_any_place(encoder: Encoder, images: Tensor) -> None:
    history = encoder.new_history(GRID, rows=1, frames=3)
    for place, number in enumerate((0, 1, 2)):
        append(encoder, images[[number]], history, place)
    append(encoder, images[[3]], history, 1)
    feature = append(encoder, images[[4]], history, 2)[0]
    assert (feature - last_feature(encoder, images[[0, 3, 4]])).abs().max() < ROUNDING


def test_a_frame_sees_all_places_before_frames_in_whatever_order(encoder: Encoder, images: Tensor) -> None:
    history = encoder.new_history(GRID, rows=1, frames=3)
    for place in range(3):
        append(encoder, images[[place]], history, place)
    other = encoder.new_history(GRID, rows=1, frames=3)
    for place, number in enumerate((0, 1, 2)):
        append(encoder, images[[number]], other, place)
    tokens = encoder.patch_tokens(images[[3]])
    replaced = encoder.extend(tokens, history, [0], 1, frames=3, want_feature=[True])
    for row in other._pairs:  # frames 0, 2, and then the new one
        row[:, :, 1] = row[:, :, 2]
    behind = encoder.extend(tokens, other, [0], 2, frames=3, want_feature=[True])
    assert replaced is not None
    assert behind is not None
    assert (replaced - behind).abs().max() < ROUNDING


def test_a_history_that_grows_keeps_what_it_holds(encoder: Encoder, images: Tensor) -> None:
    history = encoder.new_history(GRID, rows=1, frames=1)
    append(encoder, images[:1], history, 0)
    history.grow(2)
    feature = append(encoder, images[[1]], history, 1)[0]
    assert torch.equal(feature, last_feature(encoder, images[:2]))


class Copied(TorchDispatchMode):
    """Bytes written by operations that only move values, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        name = operation.name()
        if any(part in name for part in ("copy", "cat", "stack", "clone", "index", "gather")):
            self.bytes += out.nbytes
        return out


def test_bytes_copied_grow_with_the_length_of_a_list_not_with_its_square(
    small_checkpoint: Path, images: Tensor
) -> None:
    encoder = Checkpoint.open(str(small_checkpoint)).load(compute_dtype="bfloat16")

    def copied(length: int) -> int:
        frames = [place % 5 for place in range(length)]
        with Copied() as counted:
            for _ in encode_lists(
                encoder, [list(enumerate(frames))], lambda one: images[one[1]], batch_size=1
            ):  # type: ignore[index]
                pass
        return counted.bytes

    four, eight, twelve = (copied(length) for length in (4, 8, 12))
    assert twelve - eight == pytest.approx(eight - four, rel=0.01)


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

    def run(history: History | None, want_feature: list[bool]) -> Tensor | None:
        rows = range(3) if history else ()
        return encoder.extend(tokens, history, rows, want_feature=want_feature)

    everything = run(None, [True] * 3)
    some = run(None, [False, True, False])
    kept = encoder.new_history(GRID, rows=3, frames=2)
    assert run(kept, [False] * 3) is None
    assert run(None, [False] * 3) is None
    assert finished == [3, 1]
    assert everything is not None
    assert some is not None
    assert (some[0] - everything[1]).abs().max() < ROUNDING
    after = append(encoder, images[[3]], kept, 1, [1])[0]
    assert (after - last_feature(encoder, images[[1, 3]])).abs().max() < ROUNDING


def test_a_history_is_as_large_as_its_rows_and_frames(encoder: Encoder) -> None:
    history = encoder.new_history(GRID, rows=2, frames=3)
    pairs, tokens = encoder.layer + 1, 5 + GRID[0] * GRID[1]
    found = sum(pair.untyped_storage().nbytes() for pair in history._pairs)
    assert found == 2 * 3 * pairs * 2 * tokens * 384 * 4


@pytest.mark.parametrize(
    ("rows", "place", "frames", "reason"),
    [
        ([0, 0], 0, None, "a row of its own"),
        ([0], 0, None, "a row of its own"),
        ([0, 1], 2, None, "does not lie in"),
        ([0, 1], 1, 1, "does not lie in"),
    ],
)
def test_branches_without_a_place_are_refused(
    encoder: Encoder, images: Tensor, rows: list[int], place: int, frames: int | None, reason: str
) -> None:
    history = encoder.new_history(GRID, rows=2, frames=2)
    tokens = encoder.patch_tokens(images[:2])
    with pytest.raises(ValueError, match=reason):
        encoder.extend(tokens, history, rows, place, want_feature=[True] * 2, frames=frames)


def test_a_prefix_of_another_grid_is_refused(encoder: Encoder, images: Tensor) -> None:
    """Even with equal token counts: there the published code runs on, and is wrong."""
    history = encoder.new_history(GRID, rows=1, frames=2)
    append(encoder, images[:1], history, 0)
    turned = images[1].transpose(0, 1)[None]
    with pytest.raises(FrameError, match=r"9 x 6 patches .* 6 x 9: .* use images of one size in a list"):
        encoder.extend(encoder.patch_tokens(turned), history, [0], 1, want_feature=[True])


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 28, 28, 3, dtype=torch.float64),
        torch.zeros(28, 28, 3, dtype=torch.uint8),
        torch.zeros(1, 28, 30, 3, dtype=torch.uint8),
    ],
    ids=["float64", "no batch", "no multiple of 14"],
)
def test_pixels_of_another_kind_are_refused(encoder: Encoder, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        encoder.frame_features(pixels)


def set_backend_precision(precision: str) -> None:
    torch.backends.mkldnn.matmul.fp32_precision = precision


def set_precision_of_everything(precision: str) -> None:
    torch.backends.fp32_precision = precision


SETTINGS: dict[str, tuple[Callable[[Any], None], object, object]] = {
    "default dtype": (torch.set_default_dtype, torch.bfloat16, torch.float32),
    "matmul precision": (torch.set_float32_matmul_precision, "medium", "highest"),
    "backend precision": (set_backend_precision, "bf16", "none"),
    "precision of everything": (set_precision_of_everything, "bf16", "none"),
}
"""What a training loop may have set, and the default."""


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_the_caller_change_no_feature_and_stay(
    small_checkpoint: Path, images: Tensor, alone: Tensor, kind: str
) -> None:
    if kind not in ("default dtype", "matmul precision") and not hasattr(
        torch.backends.cuda.matmul, "fp32_precision"
    ):
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


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="this torch has one setting for all"
)
@pytest.mark.parametrize("owner", ["torch.backends", "torch.backends.cuda.matmul"])
def test_products_are_exact_inside_and_the_callers_again_outside(owner: str) -> None:
    """On CUDA as well: what the setting says can be read without a GPU."""
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision = "none"
    place = matmul if owner.endswith("matmul") else torch.backends
    place.fp32_precision = "tf32"
    try:
        with own_numerics(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
        place.fp32_precision = "ieee"  # what is set for all reaches products again
        assert matmul.fp32_precision == "ieee"
    finally:
        place.fp32_precision = "none"


def test_no_convolution_runs_whose_precision_would_be_another_setting(
    encoder: Encoder, images: Tensor
) -> None:
    names: set[str] = set()

    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.add(operation.name())
            return operation(*args, **(kwargs or {}))

    with Named():
        encoder.frame_features(images[:1])
    assert any("mm" in name for name in names)
    assert not [name for name in names if "conv" in name]


def backends_of(step: tuple[int, ...]) -> tuple[bool, bool, bool]:
    """Whether a step of this shape may use cuDNN, flash and efficient attention on CUDA."""
    flags = torch.backends.cuda
    with own_numerics(torch.device("cuda"), *step):
        return flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled()


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_shape_that_is_met_seldom_makes_cudnn_build_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "_steps", Counter())
    monkeypatch.delenv(numerics.ATTENTION, raising=False)
    often = [backends_of((1, 2)) for _ in range(numerics.PLAN_AFTER + 1)]
    assert set(often[:-1]) == {(False, True, True)}
    assert often[-1] == (True, True, True)
    assert backends_of((1, 3)) == (False, True, True)
    monkeypatch.setenv(numerics.ATTENTION, "flash")
    assert backends_of((1, 2)) == (False, True, True)
    monkeypatch.setenv(numerics.ATTENTION, "cudnn")
    assert backends_of((1, 4)) == (True, True, True)
    monkeypatch.setenv(numerics.ATTENTION, "fast")
    with pytest.raises(SettingsError, match=r"VGGT_CACHE_SDPA is 'fast'.*auto, flash, cudnn"):
        backends_of((1, 2))


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


def test_bfloat16_holds_matrices_only_and_keeps_keys_small(small_checkpoint: Path) -> None:
    low = Checkpoint.open(str(small_checkpoint)).load(compute_dtype="bfloat16")
    for name, weight in low.state_dict().items():
        is_matrix = any(part in name for part in ("qkv", ".proj.", "fc1", "fc2"))
        assert weight.dtype == (torch.bfloat16 if is_matrix else torch.float32), name
    assert low.new_history(GRID, rows=1, frames=1)._pairs[0].dtype == torch.bfloat16


def test_an_unknown_compute_dtype_is_refused(encoder: Encoder) -> None:
    with pytest.raises(SettingsError, match=r"compute_dtype is 'float16'.*bfloat16"):
        Encoder(encoder.config, compute_dtype="float16")

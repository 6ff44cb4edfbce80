"""The encoder computes what the published code computes: 5e-5 in float32 on the CPU, at every stored layer."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import golden_recipe
from vggt_cache.encoder import Checkpoint, Encoder, EncoderConfig, History, expected_shapes

TOLERANCE = 5e-5
LAYERS = (0, 1, -2, -1)
FRAME = golden_recipe.stored("frame.npz")
CAUSAL = golden_recipe.stored("causal.npz")
JOINT, JOINT_FLOAT = golden_recipe.stored("joint.npz"), golden_recipe.stored("joint_float.npz")
FRAME_CASES = sorted({key.rsplit("/", 2)[0] for key in FRAME if "/L0/" in key})


@pytest.fixture(scope="module")
def encoder(small_checkpoint: Path) -> Encoder:
    return Checkpoint.open(str(small_checkpoint), layer=(0, 1, 2, 3)).load(tokens="all")


def step(
    encoder: Encoder, image: Tensor, history: History | None = None, place: int = 0
) -> tuple[Tensor, Tensor]:
    """All tokens of one frame after each pair [4, n, 2C], and the patch tokens [h * w, C]."""
    patches = encoder.patch_tokens(image[None])
    rows = [0] if history else []
    features = encoder.extend(patches, history, rows, place, want_feature=[True])
    assert features is not None
    return features[0], patches[0].flatten(0, 1)


def test_the_golden_weights_are_the_ones_the_goldens_were_made_with(small_config: EncoderConfig) -> None:
    weights = golden_recipe.make_weights(expected_shapes(small_config))
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(weights[name].numpy().tobytes(), crc)
    assert crc == golden_recipe.WEIGHTS_CRC32


@pytest.mark.parametrize("case", FRAME_CASES)
def test_single_frame_agrees_with_the_published_code(encoder: Encoder, case: str) -> None:
    size, seed = case.split("/s")
    width, height = map(int, size.split("x"))
    pairs, patches = step(encoder, golden_recipe.image(int(seed), height, width))
    differences = {
        layer: golden_recipe.largest_difference(FRAME, f"{case}/L{layer}", pairs[layer % 4], special=5)
        for layer in LAYERS
    }
    differences["tower"] = golden_recipe.largest_difference(FRAME, f"{case}/patch_embed", patches, special=0)
    assert max(differences.values()) < TOLERANCE, differences


def test_causal_sequence_agrees_with_the_published_code(encoder: Encoder) -> None:
    history = encoder.new_history((8, 11), rows=1, frames=6)
    for number in range(6):
        pairs, _ = step(encoder, golden_recipe.image(21, 112, 154, number), history, number)
        for layer in LAYERS:
            difference = golden_recipe.largest_difference(
                CAUSAL, f"f{number}/L{layer}", pairs[layer % 4], special=5
            )
            assert difference < TOLERANCE, (number, layer)


def test_raw_keys_and_values_agree_with_the_published_cache(encoder: Encoder) -> None:
    """Head 0 of the first global block, tokens 0..9 of frames 0 and 5: as projected, before norm and rotation."""
    projected: list[Tensor] = []

    def record(_: torch.nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        projected.append(output[0, :10].view(10, 3, encoder.config.num_heads, -1)[:, 1:, 0])

    handle = encoder.get_submodule("global_blocks.0.attn.qkv").register_forward_hook(record)
    history = encoder.new_history((8, 11), rows=1, frames=6)
    for number in range(6):
        step(encoder, golden_recipe.image(21, 112, 154, number), history, number)
    handle.remove()
    for which, name in enumerate("kv"):
        found = torch.stack([projected[number][:, which] for number in (0, 5)]).numpy()
        assert np.abs(found - CAUSAL[f"kv/layer0_{name}_head0"]).max() < TOLERANCE


@pytest.mark.parametrize("layer", [0, 1, -2])
def test_an_encoder_stopped_earlier_gives_the_same_output(
    encoder: Encoder, small_checkpoint: Path, layer: int
) -> None:
    image = golden_recipe.image(11, 112, 154)
    stopped = Checkpoint.open(str(small_checkpoint), layer=layer).load()
    pairs = step(encoder, image)[0]
    assert torch.equal(stopped.frame_features(image[None])[0].flatten(0, 1), pairs[layer % 4][5:])
    assert len(stopped.global_blocks) == layer % 4 + 1


@pytest.mark.parametrize(
    ("case", "frames", "height", "width"),
    [("s31_3x112x140", 3, 112, 140), ("s32_2x98x98", 2, 98, 98), ("s33_1x112x154", 1, 112, 154)],
)
def test_joint_list_agrees_with_the_published_code(
    encoder: Encoder, case: str, frames: int, height: int, width: int
) -> None:
    seed = int(case[1:3])
    pixels = torch.stack([golden_recipe.image(seed, height, width, number) for number in range(frames)])
    features = encoder.joint_features(encoder.patch_tokens(pixels)[None])[0]
    for frame, layers in enumerate(features):
        for layer, tokens in enumerate(layers):
            difference = golden_recipe.largest_difference(
                JOINT, f"{case}/f{frame}/L{layer}", tokens, special=5
            )
            assert difference < TOLERANCE, (frame, layer)


def test_joint_list_of_float_pixels_agrees_with_the_published_code(encoder: Encoder) -> None:
    """Pixels that were resized as floats, which no uint8 image has."""
    drawn = torch.stack([golden_recipe.image(51, 100, 130, number) for number in range(3)]).float() / 255
    pixels = functional.interpolate(
        drawn.permute(0, 3, 1, 2), size=(112, 140), mode="bilinear", align_corners=False
    ).permute(0, 2, 3, 1)
    features = encoder.joint_features(encoder.patch_tokens(pixels)[None])[0]
    for frame, layers in enumerate(features):
        for layer in (1, 2, 3):
            name = f"float_s51/f{frame}/L{layer}"
            difference = golden_recipe.largest_difference(JOINT_FLOAT, name, layers[layer], special=5)
            assert difference < TOLERANCE, (frame, layer)


@pytest.fixture(scope="module")
def three_frames() -> Tensor:
    return torch.stack([golden_recipe.image(31, 112, 140, number) for number in range(3)])


@pytest.fixture(scope="module")
def whole_of_each_context(encoder: Encoder, three_frames: Tensor) -> list[Tensor]:
    return every_context(encoder, three_frames)


@pytest.mark.parametrize(
    ("layer", "tokens"),
    [
        (-1, "patches"),
        (-1, "all"),
        (1, "patches+camera"),
        (1, "special"),
        ((0, 2), "special"),
        ((0, 2), "patches"),
    ],
)
def test_what_is_kept_is_a_part_of_all_that_there_is(
    whole_of_each_context: list[Tensor],
    three_frames: Tensor,
    small_checkpoint: Path,
    layer: int | tuple[int, ...],
    tokens: str,
) -> None:
    """In every context, to the noise of products of another shape: fewer tokens, fewer layers change no value."""
    chosen = Checkpoint.open(str(small_checkpoint), layer=layer).load(tokens=tokens)
    which = {"patches": slice(5, None), "patches+camera": [0, *range(5, 85)], "special": slice(0, 5)}
    for found, whole in zip(every_context(chosen, three_frames), whole_of_each_context, strict=True):
        expected = whole[:, [number % 4 for number in ([layer] if isinstance(layer, int) else layer)]]
        expected = expected[:, :, which.get(tokens, slice(None))]
        if isinstance(layer, int):
            expected = expected[:, 0]
        if tokens == "patches":
            expected = expected.unflatten(-2, (8, 10))
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def every_context(encoder: Encoder, pixels: Tensor) -> list[Tensor]:
    """Features of frames alone, of the last frame of a causal list, of a joint list: each [frames, ...]."""
    tokens = encoder.patch_tokens(pixels)
    history = encoder.new_history((tokens.shape[1], tokens.shape[2]), rows=1, frames=len(pixels))
    for place, own in enumerate(tokens):
        last = encoder.extend(own[None], history, [0], place, want_feature=[True])
    assert last is not None
    return [encoder.frame_features(pixels), last, encoder.joint_features(tokens[None])[0]]


def test_pooled_patches_are_averages_of_the_patches_below(small_checkpoint: Path) -> None:
    pixels = torch.stack([golden_recipe.image(31, 112, 140, number) for number in range(2)])
    checkpoint = Checkpoint.open(str(small_checkpoint), layer=(1, -1))
    pooled = every_context(checkpoint.load(pool=(4, 5)), pixels)
    for found, whole in zip(pooled, every_context(checkpoint.load(), pixels), strict=True):
        expected = whole.unflatten(3, (5, 2)).unflatten(2, (4, 2)).mean((3, 5))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_joint_list_has_one_feature_whatever_is_computed_beside_it(encoder: Encoder) -> None:
    """Alone, in a batch, and in a batch in another order."""
    lists = torch.stack(
        [
            torch.stack([golden_recipe.image(seed, 112, 140, number) for number in range(3)])
            for seed in (31, 41, 51)
        ]
    )
    tokens = encoder.patch_tokens(lists.flatten(0, 1)).unflatten(0, (3, 3))
    together = encoder.joint_features(tokens)
    for number in range(3):
        alone = encoder.joint_features(encoder.patch_tokens(lists[number])[None])[0]
        torch.testing.assert_close(together[number], alone, rtol=0, atol=1e-5)
    order = [2, 0, 1]
    torch.testing.assert_close(encoder.joint_features(tokens[order]), together[order], rtol=0, atol=1e-5)
    other_first = encoder.joint_features(tokens[:, [1, 0, 2]])[:, 1] - together[:, 0]
    assert other_first.abs().max() > 1e-3, "which frame is the first is part of what is seen"


def test_the_order_of_later_frames_only_orders_what_comes_out(encoder: Encoder) -> None:
    """Joint attention has no time: only the first frame has tokens of its own."""
    pixels = torch.stack([golden_recipe.image(31, 112, 140, number) for number in range(4)])
    tokens = encoder.patch_tokens(pixels)[None]
    found = encoder.joint_features(tokens[:, [0, 3, 1, 2]])[0]
    torch.testing.assert_close(found, encoder.joint_features(tokens)[0][[0, 3, 1, 2]], rtol=0, atol=1e-5)

"""The encoder computes what the published code computes: 5e-5 in float32 on the CPU, at every stored layer."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import golden_recipe
from vggt_cache.encoder import Checkpoint, Encoder, EncoderConfig, History, expected_shapes

TOLERANCE = 5e-5
LAYERS = (0, 1, -2, -1)
FRAME = golden_recipe.stored("frame.npz")
CAUSAL = golden_recipe.stored("causal.npz")
FRAME_CASES = sorted({key.rsplit("/", 2)[0] for key in FRAME if "/L0/" in key})


@pytest.fixture(scope="module")
def encoder(small_checkpoint: Path) -> Encoder:
    return Checkpoint.open(str(small_checkpoint), layer=-1).load()


def step(
    encoder: Encoder, image: Tensor, history: History | None = None, place: int = 0
) -> tuple[dict[int, Tensor], Tensor, Tensor]:
    """All tokens [n, 2C] after each pair, the feature, and the patch tokens of one frame."""
    pairs: dict[int, Tensor] = {}

    def on_pair(pair: int, tokens: Tensor) -> None:
        pairs[pair] = tokens[0]

    patches = encoder.patch_tokens(image[None])
    rows = [0] if history else []
    features = encoder.extend(patches, history, rows, place, want_feature=[True], on_pair=on_pair)
    assert features is not None
    return pairs, features[0], patches[0].flatten(0, 1)


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
    pairs, feature, patches = step(encoder, golden_recipe.image(int(seed), height, width))
    differences = {
        layer: golden_recipe.largest_difference(FRAME, f"{case}/L{layer}", pairs[layer % 4], special=5)
        for layer in LAYERS
    }
    differences["tower"] = golden_recipe.largest_difference(FRAME, f"{case}/patch_embed", patches, special=0)
    assert max(differences.values()) < TOLERANCE, differences
    assert torch.equal(feature.flatten(0, 1), pairs[3][5:])


def test_causal_sequence_agrees_with_the_published_code(encoder: Encoder) -> None:
    history = encoder.new_history((8, 11), rows=1, frames=6)
    for number in range(6):
        pairs, _, _ = step(encoder, golden_recipe.image(21, 112, 154, number), history, number)
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

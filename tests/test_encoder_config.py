"""Architectures: the names and shapes of the published model, and the refusal of nonsense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vggt_cache.encoder import Encoder, EncoderConfig, expected_shapes
from vggt_cache.errors import CheckpointError, SettingsError

OFFICIAL = {"embed_dim": 1024, "img_size": 518, "patch_size": 14}
SMALL = {
    "embed_dim": 384,
    "img_size": 518,
    "patch_size": 14,
    "depth": 4,
    "num_heads": 6,
    "patch_embed": "vits",
}


def test_vggt_1b_has_exactly_the_published_names_and_shapes() -> None:
    listed = json.loads((Path(__file__).parent / "assets" / "vggt_1b_aggregator.json").read_text())
    published = {name: tuple(shape) for name, shape in listed.items()}
    assert expected_shapes(EncoderConfig.from_dict(OFFICIAL)) == published
    with torch.device("meta"):
        built = Encoder(EncoderConfig(), layer=-1).state_dict()
    assert {name: tuple(weight.shape) for name, weight in built.items()} == {
        name: shape for name, shape in published.items() if name != "patch_embed.mask_token"
    }


def test_only_the_pairs_up_to_the_layer_are_built() -> None:
    with torch.device("meta"):
        names = Encoder(EncoderConfig()).state_dict().keys()
    assert any(name.startswith("global_blocks.22.") for name in names)
    assert not any(name.startswith(("frame_blocks.23.", "global_blocks.23.")) for name in names)


def test_official_keys_alone_mean_vggt_1b() -> None:
    assert EncoderConfig.from_dict(OFFICIAL) == EncoderConfig()


@pytest.mark.parametrize(
    ("spelling", "dim", "heads"),
    [("vits", 384, 6), ("dinov2_vitb14_reg", 768, 12), ("vitl14_reg", 1024, 16), ("vitg2", 1536, 24)],
)
def test_every_tower_size_has_one_canonical_name(spelling: str, dim: int, heads: int) -> None:
    config = EncoderConfig.from_dict({"embed_dim": dim, "num_heads": heads, "patch_embed": spelling})
    assert config.patch_embed.startswith("dinov2_vit")
    assert config.patch_embed.endswith("_reg")
    assert (config.vit.embed_dim, config.vit.num_heads) == (dim, heads)
    canonical = EncoderConfig.from_dict(
        {"embed_dim": dim, "num_heads": heads, "patch_embed": config.patch_embed}
    )
    assert canonical == config


@pytest.mark.parametrize(
    "harmless",
    [
        {"_name_or_path": "facebook/VGGT-1B", "transformers_version": "5.0", "torch_dtype": "float32"},
        {"enable_camera": False, "enable_track": True, "init_values": 0.01},
        {
            "mlp_ratio": 4.0,
            "num_register_tokens": 4,
            "rope_freq": 100,
            "qk_norm": True,
            "aa_order": ["frame", "global"],
        },
    ],
)
def test_keys_that_change_nothing_are_accepted(harmless: dict[str, object]) -> None:
    assert EncoderConfig.from_dict({**SMALL, **harmless}) == EncoderConfig.from_dict(SMALL)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"embed_dim": "384"}, "embed_dim = '384', but it must be a whole number"),
        ({"embed_dim": 0}, "embed_dim = 0, but it must be a whole number from 1"),
        ({"depth": True}, "depth = True, but it must be a whole number"),
        ({"depth": 10**9}, "depth = 1000000000, but"),
        ({"embed_dim": 768}, "embed_dim = 768, but patch_embed dinov2_vits14_reg has 384 channels"),
        ({"patch_size": 16}, "patch_size = 16, but DINOv2 patches have 14 pixels"),
        ({"img_size": 520}, "img_size = 520, but it must be a multiple of 14"),
        ({"num_heads": 5}, "num_heads = 5, but embed_dim 384 must give heads"),
        ({"num_heads": 64}, "num_heads = 64, but embed_dim 384 must give heads"),
        ({"patch_embed": "conv"}, "patch_embed = 'conv', but it must be one of"),
        ({"patch_embed": None}, "patch_embed = None, but it must be one of"),
        ({"mlp_ratio": 2}, "mlp_ratio = 2, but this encoder computes 4 only"),
        ({"qk_norm": False}, "qk_norm = False, but this encoder computes True only"),
        ({"aa_block_size": True}, "aa_block_size = True, but this encoder computes 1 only"),
        ({"aa_block_size": 2}, "aa_block_size = 2, but this encoder computes 1 only"),
        ({"window": 7}, "the key 'window', which is unknown"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(change: dict[str, object], reason: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        EncoderConfig.from_dict({**SMALL, **change})
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layer", [24, -25, 1.0, True, "last"])
def test_a_layer_that_does_not_exist_is_refused(layer: int) -> None:
    with pytest.raises(SettingsError, match=r"layer is .*outputs 0 to 23 \(or -24 to -1, from the end\)"):
        EncoderConfig().absolute_layer(layer)


def test_layers_count_from_both_ends() -> None:
    assert [EncoderConfig().absolute_layer(layer) for layer in (0, 22, -2, -24)] == [0, 22, 22, 0]

"""A key covers everything that determines a feature, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from vggt_cache.errors import FrameError, SettingsError, SpecMismatchError
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing, feature_key, frame_digest

ENCODER = EncoderSpec(
    weights_digest="ab" * 32,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    img_size=518,
    patch_size=14,
    patch_embed="dinov2_vitl14_reg",
    layer=22,
    compute_dtype="bfloat16",
)
SPEC = FeatureSpec(encoder=ENCODER, preprocessing=Preprocessing(), context="causal")
FRAMES = [frame_digest(bytes([number])) for number in range(3)]

OTHER_ENCODER = {
    "weights_digest": "cd" * 32,
    "embed_dim": 384,
    "depth": 25,
    "num_heads": 8,
    "img_size": 504,
    "patch_size": 16,
    "patch_embed": "dinov2_vits14_reg",
    "layer": 21,
    "compute_dtype": "float32",
}
OTHER_PREPROCESSING = {"image_size": 644, "resize_mode": "pad", "alpha": "drop"}
OTHER_SPEC = {
    "context": "frame",
    "feature_dtype": "float16",
    "layers": (11, 22),
    "tokens": "special",
    "pool": (8, 8),
    "computation_version": 2,
}


def changed_specs() -> list[FeatureSpec]:
    specs = [dataclasses.replace(SPEC, **{name: value}) for name, value in OTHER_SPEC.items()]
    for name, value in OTHER_ENCODER.items():
        specs.append(dataclasses.replace(SPEC, encoder=dataclasses.replace(ENCODER, **{name: value})))
    for name, value in OTHER_PREPROCESSING.items():
        specs.append(dataclasses.replace(SPEC, preprocessing=Preprocessing(**{name: value})))
    return specs


def test_every_field_of_the_specification_is_changed_by_these_tests():
    """A new field must be added above, or nobody would notice that it does not enter the key."""
    fixed = {"resampling"}  # has one allowed value
    assert {field.name for field in dataclasses.fields(EncoderSpec)} == set(OTHER_ENCODER)
    assert {field.name for field in dataclasses.fields(Preprocessing)} == set(OTHER_PREPROCESSING) | fixed
    assert {field.name for field in dataclasses.fields(FeatureSpec)} == {
        *OTHER_SPEC,
        "encoder",
        "preprocessing",
    }


@pytest.mark.promise("Never a wrong feature")
def test_changing_any_field_changes_fingerprint_and_key():
    specs = [SPEC, *changed_specs()]
    assert len({spec.fingerprint for spec in specs}) == len(specs)
    assert len({feature_key(spec, FRAMES[-1:]) for spec in specs}) == len(specs)


def test_the_key_is_what_the_document_says():
    fields = dataclasses.asdict(SPEC)
    for name in ("layers", "tokens", "pool"):  # as if they did not exist, where they are not chosen
        del fields[name]
    fingerprint = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).digest()
    message = b"vggt-feature-cache key 1\0" + fingerprint + (3).to_bytes(4, "little") + b"".join(FRAMES)
    assert feature_key(SPEC, FRAMES) == hashlib.sha256(message).digest()[:16]


def test_a_known_key_never_changes():
    """Caches on users' disks depend on it. A change here needs a new computation_version, said in CHANGELOG.md."""
    assert SPEC.fingerprint == "5b3655acba86a1cb19d18288b40e23200879d7a64c34eccd33a8b28383ec95ef"
    assert feature_key(SPEC, FRAMES).hex() == "d17aa1533a0f412566e929f3c559b22d"


def test_in_causal_context_frames_their_order_and_their_number_count():
    lists = [FRAMES, FRAMES[::-1], FRAMES[:2], FRAMES[1:], [FRAMES[0], *FRAMES], FRAMES[:1]]
    assert len({feature_key(SPEC, frames) for frames in lists}) == len(lists)


def test_in_frame_context_only_the_last_frame_counts():
    spec = dataclasses.replace(SPEC, context="frame")
    assert feature_key(spec, FRAMES) == feature_key(spec, FRAMES[-1:])
    assert feature_key(spec, FRAMES) != feature_key(spec, FRAMES[:1])


def test_no_frames_and_broken_digests_have_no_key():
    with pytest.raises(ValueError, match="at least one"):
        feature_key(SPEC, [])
    with pytest.raises(ValueError, match="32 bytes"):
        feature_key(SPEC, [b"short"])


@pytest.mark.parametrize("spec", [SPEC, *changed_specs()])
def test_a_specification_survives_its_json(spec):
    assert FeatureSpec.from_json(spec.to_json()) == spec


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "null",
        "{" * 100_000,
        SPEC.to_json()[:-1] + ',"extra":1}',
        SPEC.to_json().replace('"context":"causal"', '"context":"both"'),
        SPEC.to_json()[:-1] + ',"tokens":"patches"}',
        SPEC.to_json()[:-1] + ',"tokens":"some"}',
        SPEC.to_json()[:-1] + ',"layers":[22]}',
        SPEC.to_json()[:-1] + ',"layers":[22,11]}',
        SPEC.to_json()[:-1] + ',"layers":[11,23]}',
        SPEC.to_json()[:-1] + ',"layers":[true,22]}',
        SPEC.to_json()[:-1] + ',"layers":5}',
        SPEC.to_json()[:-1] + ',"pool":[8]}',
        SPEC.to_json()[:-1] + ',"pool":[8,0]}',
        SPEC.to_json()[:-1] + ',"pool":"88"}',
        SPEC.to_json().replace('"layer":22', '"layer":99'),
        SPEC.to_json().replace('"layer":22', '"layer":22.0'),
        SPEC.to_json().replace('"embed_dim":1024', '"embed_dim":"1024"'),
        SPEC.to_json().replace('"depth":24', '"depth":true'),
        SPEC.to_json().replace(":", ": "),
    ],
)
def test_any_other_specification_is_refused(text):
    with pytest.raises(SpecMismatchError):
        FeatureSpec.from_json(text)


@pytest.mark.parametrize("image_size", [0, -14, 515, 14 * 1000, "518"])
def test_image_sizes_that_are_no_multiple_of_14_or_absurd_are_refused(image_size):
    with pytest.raises(SettingsError, match="use 518"):
        Preprocessing(image_size=image_size)


@pytest.mark.parametrize(
    ("chosen", "shape"),
    [
        ({}, (5, 7, 2048)),
        ({"context": "joint"}, (3, 5, 7, 2048)),
        ({"layers": (4, 11, 22)}, (3, 5, 7, 2048)),
        ({"tokens": "patches+camera"}, (36, 2048)),
        ({"tokens": "special"}, (5, 2048)),
        ({"tokens": "all"}, (40, 2048)),
        ({"pool": (2, 4)}, (2, 4, 2048)),
        ({"context": "joint", "layers": (11, 22), "tokens": "special"}, (3, 2, 5, 2048)),
        ({"context": "joint", "layers": (11, 22), "pool": (2, 4)}, (3, 2, 2, 4, 2048)),
    ],
)
def test_the_shape_of_a_feature_follows_from_what_is_chosen(chosen, shape):
    spec = dataclasses.replace(SPEC, **chosen)
    assert spec.shape((5, 7), frames=3) == shape
    assert FeatureSpec.from_json(spec.to_json()) == spec


def test_a_grid_is_never_pooled_to_a_larger_one():
    with pytest.raises(FrameError, match=r"5 x 7 patches .* fewer than the 6x7"):
        dataclasses.replace(SPEC, pool=(6, 7)).shape((5, 7))
    with pytest.raises(SettingsError, match="only a grid of patches can be pooled"):
        dataclasses.replace(SPEC, pool=(2, 2), tokens="all")


def test_layers_contradict_whatever_way_they_are_written():
    several = dataclasses.replace(SPEC, layers=(11, 22))
    for same in ({"layers": "11,22"}, {"layers": "-2,-13"}, {"layers": None}, {"tokens": "patches"}):
        assert several.contradictions(same) == {}, same
    assert SPEC.contradictions({"layer": -2}) == SPEC.contradictions({"layers": "22"}) == {}
    assert several.contradictions({"layer": -2}) == {"layer": "11,22"}
    assert SPEC.contradictions({"layers": "11,22", "pool": "8x8"}) == {"layers": 22, "pool": "none"}

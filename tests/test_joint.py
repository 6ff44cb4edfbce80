"""Lists of frames that all see each other, several layers, other tokens: from the flags to the disk and back."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from janusvln.features.resolve import WantedFeatures, open_cache
from janusvln.model.streaming import StreamingFeatures
from small_data import SIZE, write_annotations, write_episode, write_image
from store_kit import make_key, make_spec, shards_dir
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.encoder import Checkpoint
from vggt_cache.errors import SettingsError
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.identity import FeatureSpec
from vggt_cache.store import ShardWriter, convert, create_store, describe
from vggt_cache.store.tensors import TORCH_DTYPES

GRID, FRAMES = (3, 4), (1, 2, 5)
FORMS: dict[str, dict[str, Any]] = {
    "joint": {"context": "joint"},
    "joint layers": {"context": "joint", "layers": (0, 1)},
    "joint pooled": {"context": "joint", "pool": (2, 3)},
    "joint special, layers": {"context": "joint", "layers": (0, 1), "tokens": "special"},
    "layers": {"layers": (0, 1)},
    "all": {"context": "causal", "tokens": "all"},
    "patches+camera": {"tokens": "patches+camera"},
}


def spec_of(form: str, feature_dtype: str = "bfloat16") -> FeatureSpec:
    spec = make_spec(feature_dtype=feature_dtype, embed_dim=8)
    if "layers" in FORMS[form]:
        spec = dataclasses.replace(spec, encoder=dataclasses.replace(spec.encoder, layer=1))
    return dataclasses.replace(spec, **FORMS[form])


def features_of(spec: FeatureSpec) -> dict[bytes, torch.Tensor]:
    """Under a key for each number of frames."""
    generator = torch.Generator().manual_seed(1)
    shapes = {frames: spec.shape(GRID, frames) for frames in FRAMES}
    dtype = TORCH_DTYPES[spec.feature_dtype]
    return {
        make_key(frames): torch.randn(shape, generator=generator).to(dtype)
        for frames, shape in shapes.items()
    }


def write(cache_dir: Path, spec: FeatureSpec, codec: str = "none") -> dict[bytes, torch.Tensor]:
    features = features_of(spec)
    with ShardWriter(create_store(cache_dir, spec), spec, codec=codec) as writer:
        for key, feature in features.items():
            writer.append(key, feature)
        writer.commit()
    return features


def check(cache: FeatureCache, features: dict[bytes, torch.Tensor]) -> None:
    exact = cache.spec.feature_dtype != "int8"
    for key, feature in features.items():
        found = cache.get_by_key(key)
        assert found is not None
        assert found.shape == feature.shape
        torch.testing.assert_close(found, feature, rtol=0, atol=0 if exact else 0.1)
        assert torch.equal(cache.get_by_key(key, out=torch.empty_like(feature)), found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "codec"),
    [("bfloat16", "none"), ("bfloat16", "lossless"), ("float32", "none"), ("int8", "none")],
)
def test_every_form_of_feature_comes_back_as_it_was(
    tmp_path: Path, form: str, dtype: str, codec: str
) -> None:
    """From headers, from an index, and with a header that lost a bit."""
    spec = spec_of(form, dtype)
    features = write(tmp_path, spec, codec)
    with FeatureCache.open(tmp_path) as cache:
        assert cache.unindexed_shards
        check(cache, features)
        cache.save_index()
    with FeatureCache.open(tmp_path) as cache:
        assert not cache.unindexed_shards
        check(cache, features)
        if dtype == "int8":
            encoded = cache.get_encoded(make_key(2))
            assert encoded is not None
            assert torch.equal(encoded.decode(), cache.get_by_key(make_key(2)))
            assert torch.equal(encoded.decode_on("cpu"), encoded.decode())
    (store,) = describe(tmp_path).stores
    assert store.raw_bytes == sum(feature.nbytes for feature in features.values())
    (shard,) = shards_dir(tmp_path, spec).iterdir()
    if (dtype, codec) in (("bfloat16", "none"), ("float32", "none")):
        assert {name: value.shape for name, value in safetensors.torch.load_file(shard).items()} == {
            key.hex(): feature.shape for key, feature in features.items()
        }
    data = bytearray(shard.read_bytes())
    data[8] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)
    with pytest.warns(UserWarning, match="damaged shard"):
        cache = FeatureCache.open(tmp_path, use_index=False)
    with cache:
        check(cache, features)


def test_conversion_keeps_every_form(tmp_path: Path) -> None:
    spec = spec_of("joint layers")
    features = write(tmp_path, spec)
    for codec in ("lossless", "none"):
        assert [one.problem for one in convert(str(tmp_path), spec, codec, dry_run=False)] == [""]
        with FeatureCache.open(tmp_path) as cache:
            check(cache, features)


@pytest.mark.parametrize("form", FORMS)
def test_a_feature_of_another_shape_is_refused(tmp_path: Path, form: str) -> None:
    spec = spec_of(form)
    feature = features_of(spec)[make_key(2)]
    wrong = [feature[None], feature[..., :-1], feature[..., None, :]]
    wrong += [torch.cat([feature, feature], dim=spec.axes.index(2))] if 2 in spec.axes else []
    with ShardWriter(create_store(tmp_path, spec), spec) as writer:
        for other in wrong:
            with pytest.raises(SettingsError, match="is no feature of this store: it keeps"):
                writer.append(make_key(1), other.contiguous())


def test_a_header_with_the_shape_of_another_form_is_refused(tmp_path: Path) -> None:
    spec = spec_of("joint layers")
    write(tmp_path, spec)
    (shard,) = shards_dir(tmp_path, spec).iterdir()
    data = shard.read_bytes()
    old, new = b'"shape":[2,2,3,4,16]', b'"shape":[2,1,6,4,16]'
    assert data.count(old) == 1
    shard.chmod(0o600)
    shard.write_bytes(data.replace(old, new))
    with pytest.warns(UserWarning, match=r"a record's shape is not \[frames, 2, h, w, 16\]"):
        cache = FeatureCache.open(tmp_path)
    with cache:
        assert cache.get_by_key(make_key(2)) is None
        assert cache.get_by_key(make_key(5)) is not None


# ---------------------------------------------------------------- precompute


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five frames in lists of one, two and three, one list twice; and a list of frames of two sizes."""
    root = tmp_path / "data"
    names = write_episode(root, "scene", 5)
    write_image(root / "wide.png", 99, (96, 48))
    lists = [names[:3], names[2:], names[:2], names[3:4], names[:3]]
    write_annotations(root / "train.jsonl", [*lists, [names[0], "wide.png"]])
    return root


def precompute(data: Path, cache_dir: Path, checkpoint: Path, *flags: object) -> int:
    arguments = ["precompute", "--vggt_model_path", checkpoint, "--data_root", data, "--cache_dir", cache_dir]
    return main([*map(str, arguments), *SIZE, *map(str, flags)])


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ((), (3, 3, 4, 768)),
        (("--layers", "1,-1", "--tokens", "special"), (3, 2, 5, 768)),
        (("--layer", "-1", "--pool", "2x2"), (3, 2, 2, 768)),
    ],
)
def test_what_is_stored_is_the_encoders_output_for_the_list(
    tmp_path: Path,
    data: Path,
    small_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    flags: Any,
    shape: Any,
) -> None:
    chosen = ["--context", "joint", "--feature_dtype", "float32", *flags]
    assert precompute(data, tmp_path / "c", small_checkpoint, *chosen, "--verify", "--recompute", 2) == 3
    out = capsys.readouterr().out
    assert "Verification: 4/5 valid, 1 invalid" in out
    assert "all frames of each list, each having seen all of them" in out
    with FeatureCache.open(tmp_path / "c") as cache:
        spec = cache.spec
        frames = [data / f"scene/{number:04d}.png" for number in range(3)]
        stored = cache.get(frames)
        assert stored is not None
        assert stored.shape == shape
        assert cache.get(frames[::-1]) is None, "the order of the frames is part of the key"
        assert cache.get(frames[:2]).shape[0] == 2
    checkpoint = Checkpoint.open(str(small_checkpoint), layer=spec.kept_layers)
    encoder = checkpoint.load(tokens=spec.tokens, pool=spec.pool)
    pixels = torch.stack([torch.from_numpy(decode_frame(read_frame(f), spec.preprocessing)) for f in frames])
    expected = encoder.joint_features(encoder.patch_tokens(pixels)[None])[0]
    torch.testing.assert_close(stored, expected, rtol=0, atol=1e-5)
    (failure,) = [json.loads(line) for line in (tmp_path / "c" / "failures.jsonl").read_text().splitlines()]
    assert "wide.png" in failure["path"]
    assert "2x4" in failure["reason"] + failure["path"]


def test_a_list_whose_grid_is_smaller_than_the_pool_is_refused_and_the_others_go_on(
    tmp_path: Path, data: Path, small_checkpoint: Path
) -> None:
    """The frame of 96 x 48 pixels has two rows, the others have three."""
    assert precompute(data, tmp_path / "c", small_checkpoint, "--pool", "3x3") == 3
    (failure,) = [json.loads(line) for line in (tmp_path / "c" / "failures.jsonl").read_text().splitlines()]
    assert "2 x 4 patches (rows x columns), fewer than the 3x3" in failure["reason"]
    with FeatureCache.open(tmp_path / "c") as cache:
        assert len(cache) == 5
        assert cache.get([data / "scene/0001.png"]).shape == (3, 3, 768)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--layer", "1", "--layers", "1,2"), "give one of them"),
        (("--layers", "1;2"), "is no list of layers"),
        (("--layers", "1,9"), "has outputs 0 to 3"),
        (("--pool", "8"), "is not rows x columns"),
        (("--pool", "2x2", "--tokens", "all"), "only a grid of patches can be pooled"),
    ],
)
def test_settings_that_make_no_feature_are_refused(
    tmp_path: Path,
    data: Path,
    small_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    flags: Any,
    message: str,
) -> None:
    assert precompute(data, tmp_path / "c", small_checkpoint, *flags) == 2
    assert message in capsys.readouterr().err


def test_view_dry_run_verify_and_training_know_what_is_stored(
    tmp_path: Path, data: Path, small_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache_dir = tmp_path / "c"
    chosen = ["--context", "joint", "--layers", "1,-1", "--tokens", "all"]
    assert precompute(data, cache_dir, small_checkpoint, *chosen, "--dry_run") == 0
    out = capsys.readouterr().out
    assert "layers 1, 3, tokens all" in out
    # Lists of 3, 3, 2, 1 and 2 frames, 2 layers, 17 tokens (13 of the last, whose size is the wide one's), 2 bytes.
    mean = (3 + 3 + 2 + 1) * 2 * 17 * 768 * 2 + 2 * 2 * 13 * 768 * 2
    assert f"of {mean / 5 / 1024:.1f} KiB" in out
    assert precompute(data, cache_dir, small_checkpoint, *chosen) == 3
    where = [str(cache_dir), "--data_root", str(data)]
    assert main(["view", *where, "-o", str(tmp_path / "view.png")]) == 0
    assert (tmp_path / "view.png").stat().st_size > 0
    assert main(["verify", str(cache_dir), "--layers", "-3,-1", "--tokens", "all"]) == 0
    assert main(["verify", str(cache_dir), "--layers", "1,2"]) == 2
    assert "--layers 1,2 was given, but the cache was made with 1,3" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="JanusVLN takes all patches of the last frame and of one layer"):
        open_cache(str(cache_dir), WantedFeatures(), fill=False, location=None, device="cpu")
    assert precompute(data, cache_dir, small_checkpoint, "--context", "causal") == 3
    opened = open_cache(str(cache_dir), WantedFeatures(), fill=False, location=None, device="cpu")
    assert opened.spec.context == "causal"
    with pytest.raises(SettingsError, match="a frame also sees later ones"):
        StreamingFeatures(Checkpoint.open(str(small_checkpoint)).load(), context="joint")

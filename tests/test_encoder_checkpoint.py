"""Checkpoints: every refusal with the sentence that the user sees, and the identity of the weights."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from io import FileIO
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from vggt_cache.encoder import Checkpoint, EncoderConfig, expected_shapes
from vggt_cache.errors import CheckpointError, SettingsError

TINY = {"embed_dim": 384, "img_size": 28, "patch_size": 14, "depth": 2, "num_heads": 6, "patch_embed": "vits"}
SHAPES = expected_shapes(EncoderConfig.from_dict(TINY))
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I8": 1}
Shapes = Mapping[str, tuple[int, ...]]


def write(
    path: Path,
    shapes: Shapes,
    *,
    prefix: str = "aggregator.",
    dtype: str = "F16",
    values: Mapping[str, bytes] = {},
) -> None:
    """A safetensors file of zeros (a hole, so it takes no space), with the first bytes of some tensors set."""
    header, offset, places = {}, 0, {}
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * BYTES[dtype]
        header[prefix + name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        places[name], offset = offset, end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, data in values.items():
            file.seek(8 + len(text) + places[name])
            file.write(data)
        file.truncate(8 + len(text) + offset)


def make(directory: Path, shapes: Shapes = SHAPES, **options: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY))
    write(directory / "model.safetensors", shapes, **options)  # type: ignore[arg-type]
    return directory


def make_shards(
    directory: Path, shapes: Shapes = SHAPES, *, prefix: str = "aggregator.", **options: object
) -> Path:
    """Two shards with every other weight, and their index."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(TINY))
    placed = {}
    for number, names in enumerate((list(shapes)[::2], list(shapes)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        write(directory / file, {name: shapes[name] for name in names}, prefix=prefix, **options)  # type: ignore[arg-type]
        placed.update(dict.fromkeys((prefix + name for name in names), file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return directory


def refusal(location: Path | str) -> str:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(str(location))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- accepted


def test_opening_reads_the_configuration_and_the_default_layer(small_checkpoint: Path) -> None:
    checkpoint = Checkpoint.open(str(small_checkpoint))
    assert (checkpoint.config.depth, checkpoint.layer, checkpoint.location) == (4, 2, str(small_checkpoint))


def test_loading_gives_the_weights_of_the_file(small_checkpoint: Path) -> None:
    stored = load_file(small_checkpoint / "model.safetensors")
    loaded = Checkpoint.open(str(small_checkpoint)).load().state_dict()
    assert all(torch.equal(weight, stored[f"aggregator.{name}"]) for name, weight in loaded.items())


def test_heads_and_other_models_beside_the_aggregator_are_ignored(tmp_path: Path) -> None:
    make(tmp_path / "plain")
    others = {"camera_head.x": (3,), "depth_head.y": (2, 2), "point_head.z": (1,), "track_head.t": (1,)}
    named = {**{f"aggregator.{name}": shape for name, shape in SHAPES.items()}, **others}
    make(tmp_path / "heads", named, prefix="")
    digests = {Checkpoint.open(str(tmp_path / name)).weights_digest() for name in ("plain", "heads")}
    assert len(digests) == 1


def test_janusvln_architecture_follows_from_the_shapes(tmp_path: Path) -> None:
    names = {f"vggt.aggregator.{name}": shape for name, shape in SHAPES.items()}
    names.update(
        {"model.embed_tokens.weight": (7, 3), "visual.merger.ln_q.weight": (5,), "vggt.depth_head.a": (2,)}
    )
    make_shards(tmp_path, names, prefix="", dtype="BF16")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", "hidden_size": 2048}))
    checkpoint = Checkpoint.open(str(tmp_path), layer=-1)
    assert checkpoint.config == EncoderConfig.from_dict(TINY)
    assert checkpoint.load(compute_dtype="bfloat16").compute_dtype == "bfloat16"


def test_a_shard_without_aggregator_weights_is_not_opened(tmp_path: Path) -> None:
    make_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**placed, "lm_head.weight": "language.safetensors"}}))
    (tmp_path / "language.safetensors").write_bytes(b"not a safetensors file")
    assert Checkpoint.open(str(tmp_path)).config.depth == 2


# ---------------------------------------------------------------- names, shapes, dtypes


@pytest.mark.promise("Never silent")
def test_missing_names_are_listed(tmp_path: Path) -> None:
    left = {
        name: shape
        for name, shape in SHAPES.items()
        if "global_blocks.1" not in name and name != "camera_token"
    }
    text = refusal(make(tmp_path, left))
    assert "19 missing: camera_token, global_blocks.1.attn.k_norm.bias" in text
    assert "and 9 more" in text


@pytest.mark.parametrize("name", ["register_token", "patch_embed.mask_token", "global_blocks.1.ls2.gamma"])
def test_any_official_name_is_needed(tmp_path: Path, name: str) -> None:
    left = {other: shape for other, shape in SHAPES.items() if other != name}
    assert f"(1 missing: {name})" in refusal(make(tmp_path, left))


def test_unexpected_and_misshapen_names_are_listed(tmp_path: Path) -> None:
    text = refusal(make(tmp_path, {**SHAPES, "camera_token": (1, 2, 1, 385), "time_token": (4,)}))
    assert "1 unexpected: time_token" in text
    assert "1 of another shape: camera_token [1, 2, 1, 385] instead of [1, 2, 1, 384]" in text
    assert "get a complete one, or correct config.json" in text


def test_a_configuration_of_another_depth_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "depth": 3}))
    assert "36 missing: frame_blocks.2." in refusal(tmp_path)


@pytest.mark.parametrize("dtype", ["I8", "F64"])
def test_weights_of_another_dtype_are_refused(tmp_path: Path, dtype: str) -> None:
    text = refusal(make(tmp_path, dtype=dtype))
    assert f"of a dtype that is not one of F32, F16, BF16 (camera_token {dtype}, " in text


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    text = refusal(make(tmp_path, prefix="dinov2."))
    assert "has weights named dinov2.camera_token, " in text
    assert "it is not a VGGT checkpoint; get one from facebook/VGGT-1B" in text


def test_a_janusvln_checkpoint_that_lacks_what_tells_the_architecture_is_refused(tmp_path: Path) -> None:
    left = {name: shape for name, shape in SHAPES.items() if name != "patch_embed.pos_embed"}
    assert "is not of a known architecture" in refusal(make(tmp_path, left, prefix="vggt.aggregator."))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    make(tmp_path, values={"patch_embed.norm.bias": struct.pack("<e", value)})
    with pytest.raises(
        CheckpointError, match=r"NaN or infinite values in aggregator\.patch_embed\.norm\.bias"
    ):
        Checkpoint.open(str(tmp_path)).load()


# ---------------------------------------------------------------- files and places


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "vggt_1B_commercial.pth"])
def test_a_pickle_is_refused_with_the_reason_and_the_remedy(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    text = refusal(tmp_path)
    assert f"{name} is a pickle, which can run any code when it is loaded" in text
    assert "download model.safetensors from facebook/VGGT-1B, or convert it once where you trust it" in text
    assert "is a file: " in refusal(tmp_path / name)


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    assert "holds neither model.safetensors nor model.safetensors.index.json (it holds no files)" in refusal(
        tmp_path
    )


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / "config.json").unlink()
    assert 'it says {"embed_dim": 1024, "img_size": 518, "patch_size": 14}' in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "[" * 100_000])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    make(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert "config.json cannot be read as JSON" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, size: int) -> None:
    path = make(tmp_path) / "model.safetensors"
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    assert "is not a complete safetensors file" in refusal(tmp_path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Shrinking(FileIO):
        def readinto(self, view: object) -> int:
            return 0

    checkpoint = Checkpoint.open(str(make(tmp_path)))
    monkeypatch.setattr("vggt_cache.encoder.files.FileIO", Shrinking)
    with pytest.raises(CheckpointError, match=r"became shorter while it was read: leave it alone"):
        checkpoint.load()


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [99999999999], "data_offsets": [0, 399999999996]}}',
        b'{"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}, '
        b'"a": {"dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_an_impossible_header_is_refused(tmp_path: Path, header: bytes) -> None:
    make(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    assert "is not a complete safetensors file" in refusal(tmp_path)


def test_an_absurd_header_length_is_refused_before_it_is_read(tmp_path: Path) -> None:
    make(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.write(struct.pack("<Q", 2**62))
    assert "do not hold a header of 4611686018427387904 bytes" in refusal(tmp_path)


def test_an_index_that_names_an_absent_file_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not there" in refusal(tmp_path)


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/etc/model.safetensors", "a\\b.safetensors", "model.bin"]
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, file: str) -> None:
    make(tmp_path / "outer")
    make_shards(tmp_path / "outer" / "inner")
    index = {"weight_map": {f"aggregator.{name}": file for name in SHAPES}}
    (tmp_path / "outer" / "inner" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is not a plain name of a safetensors file beside it" in refusal(
        tmp_path / "outer" / "inner"
    )


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": 3}}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, index: dict[str, object]) -> None:
    make_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "has no weight_map from names to files" in refusal(tmp_path)


def test_an_index_that_disagrees_with_its_shard_is_refused(tmp_path: Path) -> None:
    make_shards(tmp_path)
    first, second = (tmp_path / f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    second.write_bytes(first.read_bytes())
    assert "which the index beside it says it holds" in refusal(tmp_path)


def test_a_file_that_the_system_does_not_give_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    make(tmp_path)
    monkeypatch.setattr("vggt_cache.encoder.files.FileIO", refuse)
    assert "model.safetensors cannot be read (Permission denied): check the file" in refusal(tmp_path)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Repositories asked of the hub, which holds facebook/VGGT-1B only."""
    repositories: list[str] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(("pt", "bin", "*")) for pattern in allow_patterns)
        repositories.append(repository)
        if repository == "facebook/VGGT-1B":
            return str(make(tmp_path / "snapshot"))
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repositories


def test_a_hub_id_is_downloaded(asked: list[str]) -> None:
    assert Checkpoint.open("facebook/VGGT-1B").location == "facebook/VGGT-1B"
    assert asked == ["facebook/VGGT-1B"]


def test_a_failed_download_says_both_readings(asked: list[str]) -> None:
    text = refusal("checkpoints/vggt")
    assert (
        "checkpoints/vggt is neither an existing directory nor a repository that could be downloaded" in text
    )
    assert "(ConnectionError: no route to host)" in text
    assert asked == ["checkpoints/vggt"]


@pytest.mark.parametrize(
    "location", ["/models/vggt", "./models/vggt", "../vggt", "~/vggt", "vggt", "a/b/c", "a/../b"]
)
def test_what_looks_like_a_path_is_never_sent_to_the_hub(asked: list[str], location: str) -> None:
    assert f"{location} does not exist: give the directory" in refusal(location)
    assert asked == []


def test_an_existing_path_is_never_sent_to_the_hub(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "facebook" / "VGGT-1B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "facebook/VGGT-1B holds neither" in refusal("facebook/VGGT-1B")
    assert asked == []


# ---------------------------------------------------------------- identity of the weights


def digest(directory: Path, layer: int = -2) -> str:
    return Checkpoint.open(str(directory), layer=layer).weights_digest()


def test_the_digest_depends_on_neither_prefix_nor_sharding_nor_order(tmp_path: Path) -> None:
    values = {"camera_token": b"\1\2\3\4"}
    turned = dict(reversed(SHAPES.items()))
    plain = digest(make(tmp_path / "plain", values=values))
    assert digest(make(tmp_path / "turned", turned, values=values)) == plain
    for prefix in ("vggt.", "spatial_encoder.vggt_model.", "geometry_encoder.vggt."):
        assert digest(make(tmp_path / prefix, prefix=f"{prefix}aggregator.", values=values)) == plain
    shards = make_shards(tmp_path / "shards")
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    with (shards / index["aggregator.camera_token"]).open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin = json.loads(file.read(length))["aggregator.camera_token"]["data_offsets"][0]
        file.seek(8 + length + begin)
        file.write(b"\1\2\3\4")
    assert digest(shards) == plain


@pytest.mark.parametrize(
    ("name", "layer", "changes"),
    [
        ("frame_blocks.0.norm1.bias", 0, True),
        ("global_blocks.1.mlp.fc2.weight", 1, True),
        ("global_blocks.1.mlp.fc2.weight", 0, False),
        ("patch_embed.mask_token", 1, False),
    ],
)
def test_the_digest_covers_exactly_the_weights_in_use(
    tmp_path: Path, name: str, layer: int, changes: bool
) -> None:
    before = digest(make(tmp_path / "before"), layer)
    after = digest(make(tmp_path / "after", values={name: b"\1"}), layer)
    assert (before != after) == changes


def test_the_digest_covers_the_dtype(tmp_path: Path) -> None:
    """Zeros have the same bytes in both, and other numbers do not."""
    assert digest(make(tmp_path / "a", dtype="F16")) != digest(make(tmp_path / "b", dtype="BF16"))


def test_loading_first_or_last_gives_the_same_digest(tmp_path: Path) -> None:
    make(tmp_path)
    loaded_first = Checkpoint.open(str(tmp_path))
    loaded_first.load()
    # The digest is known now: the files are not read again.
    (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    found = loaded_first.weights_digest()
    (tmp_path / "moved.safetensors").rename(tmp_path / "model.safetensors")
    assert found == digest(tmp_path)


@pytest.mark.parametrize("digest_first", [True, False])
def test_weights_that_change_between_digest_and_load_are_refused(tmp_path: Path, digest_first: bool) -> None:
    checkpoint = Checkpoint.open(str(make(tmp_path)))
    if digest_first:
        checkpoint.weights_digest()
        make(tmp_path, values={"camera_token": b"\1"})
    else:
        make(tmp_path, dict(reversed(SHAPES.items())))
    with pytest.raises(CheckpointError, match=r"the weights at .* changed while they were in use"):
        checkpoint.load()


def test_the_spec_carries_architecture_and_digest(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(str(make(tmp_path)), layer=0)
    spec = checkpoint.spec("bfloat16")
    assert (spec.depth, spec.layer, spec.patch_embed, spec.channels) == (2, 0, "dinov2_vits14_reg", 768)
    assert spec.weights_digest == checkpoint.weights_digest()


@pytest.mark.parametrize(
    ("device", "reason"), [("gpu", "which torch does not know"), ("cuda:99", "torch sees")]
)
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        Checkpoint.open(str(make(tmp_path))).load(device=device)


def test_half_precision_files_give_float32_norms_and_tokens(tmp_path: Path) -> None:
    encoder = Checkpoint.open(str(make(tmp_path, dtype="BF16"))).load()
    assert {weight.dtype for weight in encoder.state_dict().values()} == {torch.float32}


def test_files_of_the_safetensors_library_and_ours_agree(tmp_path: Path) -> None:
    """The library pads and orders as it likes; what is read is the same."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).half() for name, shape in SHAPES.items()}
    make(tmp_path)
    save_file(
        {f"aggregator.{name}": weight for name, weight in weights.items()}, tmp_path / "model.safetensors"
    )
    loaded = Checkpoint.open(str(tmp_path), layer=-1).load().state_dict()
    assert all(torch.equal(weight, weights[name].float()) for name, weight in loaded.items())

"""A model trained here in JanusVLN's layout: names, shapes, configuration, and that it is still the same model."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from evaluation_kit import write_trained
from janusvln.export import directory
from janusvln.export.__main__ import main
from janusvln.export.directory import export
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from model_kit import images, prompt, rows
from vggt_cache.encoder import EncoderConfig, expected_shapes
from vggt_cache.errors import CheckpointError, DiskSpaceError, FileAccessError, SettingsError, VggtCacheError

LAYOUT = json.loads((Path(__file__).parent / "assets" / "janusvln_layout.json").read_text())
"""What JanusVLN's model on transformers 4.50 has: its weights for the tiny model, and the fields of its config.json."""


@pytest.fixture(scope="module")
def trained(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trained(tmp_path_factory.mktemp("trained"), small_checkpoint, lam=0.3)


@pytest.fixture(scope="module")
def exported(trained: Path, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "out"
    export(str(trained), str(out), str(small_checkpoint))
    return out


def shapes_in(model: Path) -> dict[str, list[int]]:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(model / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # 4.50 refuses a file that does not say so
            found[name] = opened.get_slice(name).get_shape()
    return found


def logits(model: Path) -> torch.Tensor:
    grid = (2, 4)
    feature = torch.randn(3, 4, 768, generator=torch.Generator().manual_seed(5))
    loaded = JanusVLN.from_pretrained(model).eval()
    with torch.no_grad():
        seen = loaded(**rows(prompt(grid, grid)), **images(grid, grid), spatial_features=[feature]).logits
    assert isinstance(seen, torch.Tensor)
    return seen


def test_the_weights_have_the_published_names_and_shapes(exported: Path, small_config: EncoderConfig) -> None:
    vggt = {f"vggt.aggregator.{name}": list(shape) for name, shape in expected_shapes(small_config).items()}
    assert shapes_in(exported) == {**LAYOUT["weights"], **vggt}


def test_the_configuration_is_flat_and_has_every_field_that_is_read_there(
    exported: Path, trained: Path
) -> None:
    flat, nested = (json.loads((model / "config.json").read_text()) for model in (exported, trained))
    assert set(LAYOUT["config"]) <= flat.keys()
    assert set(LAYOUT["vision_config"]) <= flat["vision_config"].keys()
    assert "text_config" not in flat
    text = nested["text_config"]
    kept = set(LAYOUT["config"]) & text.keys()
    assert len(kept) > 14
    assert {name: flat[name] for name in kept} == {name: text[name] for name in kept}
    assert flat["rope_theta"] == 1e6
    assert flat["rope_scaling"] == {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    assert (flat["use_vggt_feature"], flat["reference_frame"], flat["lam"]) == (True, "first", 0.3)
    assert (flat["vggt_merger_hidden_dim"], flat["torch_dtype"]) == (128, "float32")


def test_vggt_is_the_very_one(exported: Path, small_checkpoint: Path) -> None:
    index = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(small_checkpoint / "model.safetensors", "pt") as original:
        for name in original.keys():  # noqa: SIM118
            with safe_open(exported / index[f"vggt.{name}"], "pt") as file:
                assert torch.equal(file.get_tensor(f"vggt.{name}"), original.get_tensor(name)), name


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_is_the_same_model(
    trained: Path, small_checkpoint: Path, tmp_path: Path, tied: bool
) -> None:
    source = write_trained(tmp_path, small_checkpoint, tied=True) if tied else trained
    export(str(source), str(tmp_path / "out"), str(small_checkpoint))
    assert torch.equal(logits(source), logits(tmp_path / "out"))
    ours, theirs = (JanusVLN.from_pretrained(model).config.to_dict() for model in (source, tmp_path / "out"))
    ours["text_config"]["rope_parameters"]["type"] = (
        "default"  # the older name of rope_type, which 4.50 reads too
    )
    for name in ("feature_spec", "text_config", "tie_word_embeddings", "lam", "spatial_hidden_size"):
        assert ours[name] == theirs[name], name


def test_an_exported_model_brings_its_own_vggt(exported: Path, tmp_path: Path) -> None:
    export(str(exported), str(tmp_path / "again"), str(exported))
    assert shapes_in(exported) == shapes_in(tmp_path / "again")


def test_the_processors_files_are_those_of_transformers_4(exported: Path) -> None:
    tokenizer = json.loads((exported / "tokenizer_config.json").read_text())
    assert tokenizer["processor_class"] == "Qwen2_5_VLProcessor"
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)  # at which 4.50 fails
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    images = json.loads((exported / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["max_pixels"]) == (784, 12845056)
    assert "<|im_start|>" in json.loads((exported / "chat_template.json").read_text())["chat_template"]


def test_files_have_the_modes_of_the_umask(trained: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        export(str(trained), str(tmp_path / "out"), str(small_checkpoint))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


# ---------------------------------------------------------------- refusals


def other_vggt(tmp_path: Path, vggt: Path) -> Path:
    other = tmp_path / "other"
    other.mkdir()
    with safe_open(vggt / "model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights["aggregator.camera_token"] = weights["aggregator.camera_token"] + 1
    save_file(weights, other / "model.safetensors")
    (other / "config.json").write_bytes((vggt / "config.json").read_bytes())
    return other


def without(name: str, trained: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in trained.iterdir():
        if path.name != name:
            (copy / path.name).symlink_to(path)
    return copy


def without_feature_spec(trained: Path, tmp_path: Path) -> Path:
    copy = without("config.json", trained, tmp_path)
    fields = json.loads((trained / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**fields, "feature_spec": None}))
    return copy


Case = tuple[Callable[[Path, Path, Path], tuple[Path, Path]], type[VggtCacheError], str]
CASES: dict[str, Case] = {
    "frame context": (
        lambda trained, vggt, tmp: (write_trained(tmp, vggt, context="frame"), vggt),
        CheckpointError,
        "context frame, and JanusVLN's code computes causal ones",
    ),
    "another layer": (
        lambda trained, vggt, tmp: (write_trained(tmp, vggt, layer=1), vggt),
        CheckpointError,
        "layer 1, and JanusVLN's code takes layer 2",
    ),
    "another VGGT": (
        lambda trained, vggt, tmp: (trained, other_vggt(tmp, vggt)),
        SettingsError,
        "holds another VGGT",
    ),
    "no features": (
        lambda trained, vggt, tmp: (without_feature_spec(trained, tmp), vggt),
        CheckpointError,
        "does not say which features it was trained with",
    ),
    "a plain Qwen": (
        lambda trained, vggt, tmp: (trained.parent / "qwen", vggt),
        CheckpointError,
        "does not say which features it was trained with",
    ),
    "no tokenizer": (
        lambda trained, vggt, tmp: (without("tokenizer.json", trained, tmp), vggt),
        CheckpointError,
        "has no tokenizer.json",
    ),
    "no chat template": (
        lambda trained, vggt, tmp: (without("chat_template.jinja", trained, tmp), vggt),
        CheckpointError,
        "has no chat template",
    ),
    "no processor": (
        lambda trained, vggt, tmp: (without("preprocessor_config.json", trained, tmp), vggt),
        CheckpointError,
        "has no preprocessor_config.json",
    ),
    "no VGGT": (
        lambda trained, vggt, tmp: (trained, tmp / "nowhere"),
        CheckpointError,
        "nowhere does not exist",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_would_be_wrong_there_is_refused_in_one_sentence(
    case: str, trained: Path, small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, error, sentence = CASES[case]
    source, vggt = make(trained, small_checkpoint, tmp_path)
    with pytest.raises(error, match=sentence):
        export(str(source), str(tmp_path / "new" / "out"), str(vggt))
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    assert main([str(source), str(tmp_path / "new" / "out"), "--vggt_model_path", str(vggt)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[ERROR] ")


def test_nothing_is_overwritten(trained: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SettingsError, match="exists and is not empty, and nothing is overwritten"):
        export(str(trained), str(tmp_path), str(small_checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_fails_half_way_leaves_nothing(
    trained: Path, small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = directory._write_file, []

    def full(target: Path, *rest: Any) -> None:
        write(target, *rest)
        written.append(target)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(directory, "_write_file", full)
    with pytest.raises(FileAccessError, match="cannot be written \\(No space left on device\\)"):
        export(str(trained), str(tmp_path / "out"), str(small_checkpoint))
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    trained: Path, small_checkpoint: Path, small_disk: Path
) -> None:
    with pytest.raises(DiskSpaceError, match=r"needs 0\.1 GB and 0\.0 GB are free there"):
        export(str(trained), str(small_disk / "out"), str(small_checkpoint))
    assert list(small_disk.iterdir()) == []


def test_the_command_tells_what_the_published_code_does_otherwise(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_trained(tmp_path, small_checkpoint, action_head=True)
    capsys.readouterr()
    assert main([str(source), str(tmp_path / "out"), "--vggt_model_path", str(small_checkpoint)]) == 0
    said = capsys.readouterr().out.splitlines()
    told = [line for line in said if line.startswith("[WARN]")]
    for part in ("image_size 56", "768 channels", "the action head is left out", "no point_head"):
        assert any(part in line for line in told), part
    assert said[-1] == f"[SUCCESS] Exported to {tmp_path / 'out'}"
    assert not [name for name in shapes_in(tmp_path / "out") if "action" in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["action_head"] is False

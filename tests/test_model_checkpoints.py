"""What is loaded, what is said about it, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, core_model_loading

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.model import checkpoints
from janusvln.model.config import JanusVLNConfig
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from model_kit import CHANNELS, HIDDEN, feature, images, load, prompt, rows
from vggt_cache.errors import CheckpointError, VggtCacheError

GRID = (4, 6)
SIZES = {"spatial_channels": CHANNELS, "spatial_hidden_size": HIDDEN}
Weights = dict[str, Tensor]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def ours(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ours")
    load(
        plain, action_head=True, lam=0.7, feature_spec={"context": "causal", "image_size": 644}
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def released(ours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As JanusVLN publishes: transformers 4.50's names and flat configuration, VGGT's weights inside."""
    directory = tmp_path_factory.mktemp("released")
    weights = {
        name: weight
        for name, weight in load_file(ours / WEIGHTS).items()
        if not name.startswith("action_head")
    }
    assert {name.split(".")[0] for name in weights} == {"visual", "model", "lm_head", "merger"}
    vggt = {f"vggt.aggregator.global_blocks.{i}.attn.qkv.weight": torch.ones(6, 2) for i in range(4)}
    vggt |= {"vggt.depth_head.norm.weight": torch.ones(3)}
    save_file(weights | vggt, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(flat_config(ours)))
    return directory


def flat_config(directory: Path) -> dict[str, Any]:
    fields = json.loads((directory / "config.json").read_text())
    text = fields["text_config"]
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    dropped = ("model_type", "dtype", "layer_types")
    vision = {k: v for k, v in fields["vision_config"].items() if k not in ("rope_parameters", "dtype")}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {
        **{name: value for name, value in text.items() if name not in dropped},
        **{name: fields[name] for name in names},
        "vision_config": {**vision, "model_type": "qwen2_5_vl"},
        "model_type": "qwen2_5_vl",
        "architectures": ["Qwen2_5_VLForConditionalGenerationForJanusVLN"],
        "transformers_version": "4.50.0",
        "lam": 0.7,
        "reference_frame": "first",
    }


def logits(model: Any) -> Tensor:
    batch = rows(prompt(GRID, GRID)) | images(GRID, GRID)
    values: Tensor = model(**batch, spatial_features=[feature(GRID)]).logits
    return values


def changed(source: Path, target: Path, change: Callable[[Weights], Any]) -> Path:
    shutil.copytree(source, target)
    weights = load_file(target / WEIGHTS)
    change(weights)
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})
    return target


def shard(directory: Path) -> None:
    """Split the file into two with an index, as large checkpoints are."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    names = sorted(weights)
    placed = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(placed.values()):
        part = {name: weights[name] for name in names if placed[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def reports() -> Iterator[list[str]]:
    """What transformers logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


def refusal(location: str | Path, **fields: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        JanusVLN.from_pretrained(location, **fields)
    return str(caught.value)


# ---------------------------------------------------------------- a plain Qwen2.5-VL


def test_a_plain_model_gets_a_fresh_merger_and_says_so_in_one_line(
    plain: Path, capsys: pytest.CaptureFixture[str], reports: list[str]
) -> None:
    model = JanusVLN.from_pretrained(plain, spatial_hidden_size=4096)
    assert said(capsys) == [
        f"[INFO] {plain} is a plain Qwen2.5-VL: the spatial merger starts from fresh weights"
    ]
    assert reports == []
    first, second = model.merger.mlp[0], model.merger.mlp[2]
    assert first.weight.shape == (4096, 4 * 2048)
    assert second.weight.shape == (64, 4096)
    for linear in (first, second):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert (linear.bias == 0).all()
    assert (model.merger.ln_q.weight == 1).all()
    assert (model.config.lam, model.config.action_head, model.config.feature_spec) == (0.2, False, None)


def test_everything_else_of_a_plain_model_is_loaded(plain: Path) -> None:
    own = JanusVLN.from_pretrained(plain, **SIZES).state_dict()
    for name, weight in Qwen2_5_VLForConditionalGeneration.from_pretrained(plain).state_dict().items():
        assert torch.equal(own[name], weight), name


def test_other_processes_say_nothing(
    plain: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    JanusVLN.from_pretrained(plain, **SIZES)
    assert said(capsys) == []


def test_a_fresh_action_head_is_said_too(
    plain: Path, ours: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    JanusVLN.from_pretrained(plain, **SIZES, action_head=True)
    assert "the spatial merger and the action head start from fresh weights" in said(capsys)[0]
    headless = tmp_path / "headless"
    JanusVLN.from_pretrained(plain, **SIZES).save_pretrained(headless)
    capsys.readouterr()
    model = JanusVLN.from_pretrained(headless, action_head=True)
    assert said(capsys) == [
        f"[INFO] {headless} was trained without an action head: the action head starts from fresh weights"
    ]
    assert model.action_head.weight.shape == (4, 64)
    JanusVLN.from_pretrained(ours)
    assert said(capsys) == []


def test_a_configuration_from_autoconfig_is_taken(plain: Path) -> None:
    config = AutoConfig.from_pretrained(plain)
    config.lam = 0.9
    model = JanusVLN.from_pretrained(plain, config=config, **SIZES)
    assert isinstance(model.config, JanusVLNConfig)
    assert (model.config.lam, model.config.spatial_channels) == (0.9, CHANNELS)
    assert not hasattr(config, "spatial_channels")
    eager = AutoConfig.from_pretrained(plain, attn_implementation="eager")
    assert JanusVLN.from_pretrained(plain, config=eager, **SIZES).config._attn_implementation == "eager"


def test_a_configuration_that_is_given_is_not_changed(plain: Path) -> None:
    config = JanusVLNConfig.from_pretrained(plain)
    JanusVLN.from_pretrained(plain, config=config, **SIZES, lam=0.9)
    assert (config.lam, config.spatial_channels) == (0.2, 2048)


def test_dtype_attention_and_device_map_reach_transformers(plain: Path) -> None:
    model = JanusVLN.from_pretrained(
        plain, **SIZES, dtype=torch.bfloat16, attn_implementation="eager", device_map="cpu"
    )
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert model.model.visual.config._attn_implementation == "eager"
    assert not model.training


@pytest.mark.parametrize("tied_in_file", [False, True])
def test_tied_embeddings_need_no_head_in_the_file(
    tied_in_file: bool, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def tie(weights: Weights) -> None:
        weights.pop("lm_head.weight")
        if tied_in_file:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    directory = changed(plain, tmp_path / "tied", tie)
    if not tied_in_file:
        assert "lacks lm_head.weight" in refusal(directory)
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))
    model = JanusVLN.from_pretrained(directory, **SIZES)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    expected = load_file(plain / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(model.lm_head.weight, expected)
    model.save_pretrained(tmp_path / "saved")
    again = JanusVLN.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))


# ---------------------------------------------------------------- a checkpoint made here


def test_saving_and_loading_changes_no_output(plain: Path, tmp_path: Path) -> None:
    model = load(plain, action_head=True)
    model.save_pretrained(tmp_path)
    again = JanusVLN.from_pretrained(tmp_path)
    assert torch.equal(logits(model), logits(again))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name


def test_the_file_has_janusvln_names_and_no_encoder(ours: Path) -> None:
    names = set(load_file(ours / WEIGHTS))
    own = {name for name in names if name.startswith("merger.")}
    assert own == {"merger.ln_q.weight"} | {
        f"merger.mlp.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    }
    assert {name.split(".")[0] for name in names} == {"visual", "model", "lm_head", "merger", "action_head"}
    assert "model.layers.0.mlp.up_proj.weight" in names


def test_a_model_made_from_its_configuration_saves_the_same_names(ours: Path, tmp_path: Path) -> None:
    JanusVLN(JanusVLNConfig.from_pretrained(ours)).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == set(load_file(ours / WEIGHTS))
    JanusVLN.from_pretrained(tmp_path)


def test_all_fields_are_in_the_configuration_that_autoconfig_reads(ours: Path) -> None:
    fields = json.loads((ours / "config.json").read_text())
    assert fields["model_type"] == "qwen2_5_vl"
    assert {name: fields[name] for name in ("lam", "action_head", "distill_loss_weight", "feature_spec")} == {
        "lam": 0.7,
        "action_head": True,
        "distill_loss_weight": 1.0,
        "feature_spec": {"context": "causal", "image_size": 644},
    }
    for config in (AutoConfig.from_pretrained(ours), JanusVLN.from_pretrained(ours).config):
        assert (config.lam, config.spatial_channels, config.spatial_hidden_size) == (0.7, CHANNELS, HIDDEN)
        assert config.feature_spec == {"context": "causal", "image_size": 644}


def test_fields_given_go_before_those_of_the_checkpoint(ours: Path) -> None:
    model = JanusVLN.from_pretrained(ours, lam=0.1, feature_spec={"context": "frame"})
    assert (model.config.lam, model.config.feature_spec) == (0.1, {"context": "frame"})


def test_a_checkpoint_of_ours_without_its_merger_is_not_taken_for_a_plain_one(
    ours: Path, tmp_path: Path
) -> None:
    def strip(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("merger.")]:
            del weights[name]

    assert "lacks merger.ln_q.weight" in refusal(changed(ours, tmp_path / "stripped", strip))


def test_a_checkpoint_that_lost_its_action_head_does_not_start_a_fresh_one(
    ours: Path, tmp_path: Path
) -> None:
    directory = changed(ours, tmp_path / "headless", lambda weights: weights.pop("action_head.weight"))
    assert "lacks action_head.weight" in refusal(directory)


def test_a_checkpoint_with_an_action_head_that_the_configuration_denies_is_refused(ours: Path) -> None:
    assert "also holds action_head." in refusal(ours, action_head=False)


# ---------------------------------------------------------------- a released JanusVLN checkpoint


@pytest.mark.parametrize("sharded", [False, True])
def test_a_released_checkpoint_is_mapped_and_its_encoder_left_out(
    sharded: bool,
    released: Path,
    ours: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reports: list[str],
) -> None:
    directory = tmp_path / "released"
    shutil.copytree(released, directory)
    if sharded:
        shard(directory)
    capsys.readouterr()
    model = JanusVLN.from_pretrained(directory)
    assert said(capsys) == [
        f"[INFO] {directory} is a JanusVLN checkpoint: its 5 weights of VGGT (vggt.*) are left out, features come "
        "with the batch"
    ]
    assert reports == []
    reference = JanusVLN.from_pretrained(ours)
    assert torch.equal(logits(model), logits(reference))
    assert model.config.feature_spec == {
        "context": "causal",
        "image_size": 644,
        "resize_mode": "crop",
        "layer": 2,
    }
    assert (model.config.lam, model.config.spatial_hidden_size) == (0.7, HIDDEN)
    assert not [name for name in model.state_dict() if "vggt" in name]
    model.save_pretrained(tmp_path / "saved")
    assert not [name for name in load_file(tmp_path / "saved" / WEIGHTS) if "vggt" in name]
    again = JanusVLN.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(reference))
    assert again.config.feature_spec["image_size"] == 644


def test_the_encoder_is_never_read(released: Path) -> None:
    read: list[str] = []
    original = core_model_loading.WeightTransform.add_tensor

    def watched(self: Any, target: str, source: str, *rest: Any) -> None:
        read.append(source)
        original(self, target, source, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core_model_loading.WeightTransform, "add_tensor", watched)
        JanusVLN.from_pretrained(released)
    assert read
    assert not [name for name in read if name.startswith("vggt.")]


def test_a_released_checkpoint_without_its_merger_is_refused(released: Path, tmp_path: Path) -> None:
    def strip(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("merger.")]:
            del weights[name]

    assert "lacks merger.ln_q.weight" in refusal(changed(released, tmp_path / "stripped", strip), **SIZES)


# ---------------------------------------------------------------- refusals


def test_part_of_a_merger_is_refused(ours: Path, tmp_path: Path) -> None:
    directory = changed(ours, tmp_path / "part", lambda weights: weights.pop("merger.mlp.2.bias"))
    assert "lacks merger.mlp.2.bias" in refusal(directory)


@pytest.mark.parametrize("kind", ["plain", "ours", "released"])
def test_a_missing_layer_is_refused_and_its_first_names_are_said(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    def strip(weights: Weights) -> None:
        for name in [name for name in weights if name.startswith("model.layers.1.")]:
            del weights[name]

    text = refusal(changed(request.getfixturevalue(kind), tmp_path / "cut", strip))
    assert "lacks model.language_model.layers.1.self_attn.q_proj.weight" in text
    assert "and 9 more" in text
    assert "\n" not in text


def test_an_unexpected_weight_is_refused(ours: Path, tmp_path: Path) -> None:
    directory = changed(ours, tmp_path / "more", lambda weights: weights.update(stray=torch.ones(1)))
    assert "also holds stray" in refusal(directory)


def test_another_shape_is_refused_with_both(ours: Path, plain: Path, tmp_path: Path) -> None:
    assert "merger.ln_q.weight ([48], not [2048])" in refusal(ours, spatial_channels=2048)
    directory = changed(
        plain, tmp_path / "shape", lambda weights: weights.update({"model.norm.weight": torch.ones(65)})
    )
    assert "model.language_model.norm.weight ([65], not [64])" in refusal(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt"])
def test_pickles_are_refused_unopened(name: str, plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "pickled"
    shutil.copytree(plain, directory)
    (directory / WEIGHTS).unlink()
    (directory / name).write_bytes(b"never opened")
    text = refusal(directory)
    assert name in text
    assert "pickle" in text


def test_directories_that_are_no_checkpoint_are_refused_in_a_sentence(plain: Path, tmp_path: Path) -> None:
    assert "is no directory" in refusal(tmp_path / "nowhere")
    assert "config.json" in refusal(tmp_path)
    shutil.copy(plain / "config.json", tmp_path)
    assert "no weights" in refusal(tmp_path)
    (tmp_path / WEIGHTS).write_bytes((plain / WEIGHTS).read_bytes()[:-100])
    assert "not a complete safetensors file" in refusal(tmp_path)


def test_a_hub_id_is_downloaded_to_where_the_user_said(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, **options: Any) -> str:
        asked.append((repository, options.get("cache_dir"), options.get("revision")))
        if repository == "some/absent":
            raise OSError("no such repository")
        return str(plain)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    JanusVLN.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct", cache_dir="kept", **SIZES)
    assert asked == [("Qwen/Qwen2.5-VL-3B-Instruct", "kept", None)]
    assert "no such repository" in refusal("some/absent")


def test_a_shard_that_lacks_what_the_index_promises_is_refused(plain: Path, tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    shutil.copytree(plain, directory)
    shard(directory)
    index = directory / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["weight_map"]["model.layers.2.mlp.up_proj.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(fields))
    assert "lacks model.layers.2.mlp.up_proj.weight" in refusal(directory)
    assert issubclass(CheckpointError, VggtCacheError)


def test_a_weight_that_transformers_did_not_load_after_all_is_refused(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = changed(
        plain, tmp_path / "less", lambda weights: weights.pop("visual.patch_embed.proj.weight")
    )
    monkeypatch.setattr(checkpoints, "check", lambda *_: None)
    assert "did not give model.visual.patch_embed.proj.weight" in refusal(directory, **SIZES)

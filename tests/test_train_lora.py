"""LoRA: what is trained, what is saved of it, that it is gone on from, and that one model can be made of it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

peft = pytest.importorskip("peft")

from janusvln.demo.tiny_qwen import write_tiny_qwen  # noqa: E402
from janusvln.export.merge import main as merge  # noqa: E402
from janusvln.model.modeling_qwen2_5_vl import (  # noqa: E402
    Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN,
)
from janusvln.train.command import main  # noqa: E402
from model_kit import images, prompt, rows  # noqa: E402
from train_kit import Kit, largest_difference, logged  # noqa: E402
from train_processes_kit import train  # noqa: E402
from vggt_cache.errors import CheckpointError  # noqa: E402

LORA: list[object] = ["--lora_enable", "True", "--lora_r", 4, "--lora_alpha", 8, "--learning_rate", "1e-2"]
SAVING: list[object] = ["--save_strategy", "steps", "--save_steps", 2]
GRID = (2, 4)


@pytest.fixture(scope="module")
def trained(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of four steps, with checkpoint-2 and checkpoint-4."""
    out = tmp_path_factory.mktemp("trained") / "out"
    assert main(kit.flags(out, *LORA, *SAVING, "--max_steps", 4)) == 0
    return out


def refusal(capfd: pytest.CaptureFixture[str], flags: list[str]) -> str:
    capfd.readouterr()
    assert main(flags) == 2
    (sentence,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("[ERROR] ")]
    return sentence


def logits(model: Any) -> torch.Tensor:
    feature = torch.randn(*GRID, 768, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        seen = model(**rows(prompt(GRID, GRID)), **images(GRID, GRID), spatial_features=[feature]).logits
    assert isinstance(seen, torch.Tensor)
    return seen


def by_peft(kit: Kit, checkpoint: Path) -> Any:
    """The model as peft itself puts it together."""
    model = JanusVLN.from_pretrained(kit.qwen, spatial_channels=768)
    model.load_state_dict(load_file(checkpoint / "non_lora_trainables.safetensors"), strict=False)
    return peft.PeftModel.from_pretrained(model, checkpoint).eval()


def test_adapters_and_what_else_was_trained_are_saved_and_nothing_more(kit: Kit, trained: Path) -> None:
    for directory in (trained, trained / "checkpoint-2"):
        adapters = load_file(directory / "adapter_model.safetensors")
        layers = {name.rpartition(".lora_")[0] for name in adapters}
        assert len(layers) == 2 * 7  # all linear layers of both layers of the language model
        assert {name.split(".layers.")[0] for name in layers} == {"base_model.model.model.language_model"}
        assert {min(weight.shape) for weight in adapters.values()} == {4}
        others = load_file(directory / "non_lora_trainables.safetensors")
        parts = {"merger" if name.startswith("merger.") else name.split(".")[1] for name in others}
        assert parts == {"merger", "visual"}
        assert not (directory / "model.safetensors").exists()
        assert json.loads((directory / "config.json").read_text())["feature_spec"]["context"] == "frame"
        assert (directory / "tokenizer_config.json").exists()
        assert (directory / "preprocessor_config.json").exists()
    written = json.loads((trained / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 8, str(kit.qwen))


def test_the_adapters_learn(trained: Path) -> None:
    assert logged(trained)[-1]["loss"] < logged(trained)[0]["loss"]
    weights = load_file(trained / "adapter_model.safetensors")
    assert all(weights[name].abs().max() > 0 for name in weights if ".lora_B." in name)


def test_at_first_a_model_with_adapters_is_the_model_without(kit: Kit, tmp_path: Path, trained: Path) -> None:
    assert main(kit.flags(tmp_path, "--max_steps", 1)) == 0
    assert logged(tmp_path)[0]["loss"] == pytest.approx(logged(trained)[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_run_that_is_resumed_goes_on_as_if_it_had_not_stopped(
    kit: Kit, tmp_path: Path, trained: Path, dropout: float
) -> None:
    whole, flags = trained, [*LORA, *SAVING, "--max_steps", 4, "--lora_dropout", dropout]
    if dropout:
        whole = tmp_path / "whole"
        assert main(kit.flags(whole, *flags)) == 0
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    for name in ("checkpoint-4", "adapter_model.safetensors", "trainer_state.json"):
        path = resumed / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(kit.flags(resumed, *flags)) == 0
    assert largest_difference(logged(whole), logged(resumed)) == 0.0
    for name in ("adapter_model.safetensors", "non_lora_trainables.safetensors"):
        before, after = load_file(whole / name), load_file(resumed / name)
        assert all(torch.equal(before[key], after[key]) for key in before | after)


def test_gradient_checkpointing_changes_nothing(kit: Kit, tmp_path: Path, trained: Path) -> None:
    more = [*LORA, "--max_steps", 4, "--gradient_checkpointing", "True"]
    assert main(kit.flags(tmp_path, *more)) == 0
    assert largest_difference(logged(trained), logged(tmp_path)) < 1e-5


def test_the_merged_model_answers_as_the_adapted_one(
    kit: Kit, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge([str(trained), str(tmp_path / "merged")]) == 0
    assert f"[SUCCESS] Merged into {tmp_path / 'merged'}" in capsys.readouterr().out
    merged = JanusVLN.from_pretrained(tmp_path / "merged").eval()
    assert capsys.readouterr().out == ""  # nothing starts from fresh weights
    adapted = by_peft(kit, trained)
    assert (logits(merged) - logits(adapted)).abs().max() < 1e-5
    with adapted.disable_adapter():
        assert (logits(merged) - logits(adapted)).abs().max() > 1e-3
    assert merged.config.feature_spec["context"] == "frame"
    # It can be trained on, and is whole.
    flags = kit.flags(tmp_path / "on", "--max_steps", 1)
    flags[flags.index("--model_name_or_path") + 1] = str(tmp_path / "merged")
    assert main(flags) == 0


def test_a_base_that_has_moved_is_named_and_another_one_refused(
    kit: Kit, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(kit.qwen, tmp_path / "moved")
    checkpoint = shutil.copytree(trained, tmp_path / "checkpoint")
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/no/qwen"})
    )
    out = tmp_path / "out"
    assert merge([str(checkpoint), str(out)]) == 2
    assert "/no/qwen, which" in capsys.readouterr().err
    other = write_tiny_qwen(tmp_path / "other", seed=1)
    assert merge([str(checkpoint), str(out), "--model_name_or_path", str(other)]) == 2
    assert f"{other} is another model than the one that the adapters" in capsys.readouterr().err
    assert not out.exists()
    assert merge([str(checkpoint), str(out), "--model_name_or_path", str(moved)]) == 0


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_value_at_the_end_of_a_weight_makes_another_base(
    kit: Kit, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    other = shutil.copytree(kit.qwen, tmp_path / "other")
    (file,) = other.glob("*.safetensors")
    weights = load_file(file)
    weights[name][-1, -1] += 1
    save_file(weights, file, metadata={"format": "pt"})
    assert merge([str(trained), str(tmp_path / "out"), "--model_name_or_path", str(other)]) == 2
    assert f"{other} is another model than the one" in capsys.readouterr().err


def test_what_has_no_adapters_is_not_merged(
    kit: Kit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge([str(kit.qwen), str(tmp_path / "out")]) == 2
    assert f"{kit.qwen} holds no LoRA adapters" in capsys.readouterr().err


def test_adapters_are_not_taken_for_a_model(trained: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"holds LoRA adapters and no whole model.*janusvln\.export\.merge"
    ):
        JanusVLN.from_pretrained(trained)


def test_only_the_same_kind_of_run_goes_on(
    kit: Kit, tmp_path: Path, trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(trained, tmp_path / "out")
    more = [*SAVING, "--max_steps", 6, "--learning_rate", "1e-2"]
    assert "was trained with LoRA, and this run is without it" in refusal(capfd, kit.flags(out, *more))
    sentence = refusal(capfd, kit.flags(out, *more, *LORA, "--lora_r", 8))
    assert "was trained with LoRA's r 4, and this run has 8" in sentence
    sentence = refusal(capfd, kit.flags(out, *more, *LORA, "--lora_target_modules", "q_proj,v_proj"))
    assert "LoRA's target_modules" in sentence
    other = write_tiny_qwen(tmp_path / "other", seed=1)
    sentence = refusal(capfd, kit.flags(out, *more, *LORA, "--model_name_or_path", other))
    assert f"{other} is another model than the one" in sentence
    full = tmp_path / "full"
    assert main(kit.flags(full, *SAVING, "--max_steps", 2, "--learning_rate", "1e-2")) == 0
    assert "was trained without LoRA, and this run is with it" in refusal(
        capfd, kit.flags(full, *more, *LORA)
    )


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--lora_r", "8"], "--lora_r 8 has no effect without LoRA: add --lora_enable True"),
        (["--lora_enable", "True", "--lora_r", "0"], "--lora_r 0 is out of range: give 1 or more"),
        (["--use_lora", "True", "--lora_dropout", "1"], "--lora_dropout 1.0 is out of range"),
        (["--lora_enable", "True", "--lora_bias", "all"], "--lora_bias all is not supported"),
        (["--lora_weight_path", "x"], "--lora_weight_path: adapters are gone on from with"),
        (["--lora_enable", "True", "--lora_target_modules", "qkv"], "--lora_target_modules names qkv"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    assert sentence in refusal(capfd, kit.flags(tmp_path, *flags))


def test_without_peft_one_sentence_says_how_to_get_it(
    kit: Kit, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    sentence = refusal(capfd, kit.flags(tmp_path, *LORA))
    assert "--lora_enable True needs the package peft" in sentence
    assert f"run {sys.executable} -m pip install --upgrade 'peft>=" in sentence


@pytest.mark.slow
def test_two_ranks_under_zero_3_train_save_resume_and_merge(kit: Kit, tmp_path: Path) -> None:
    """The same losses as without an engine, and adapters from which the same model is made."""
    more = [*LORA, *SAVING, "--max_steps", 4]
    plain = train(kit, tmp_path / "plain", *more, config=None)
    out = tmp_path / "zero"
    zero = train(kit, out, *more, config="zero3.json")
    assert largest_difference(plain, zero) < 1e-4
    shutil.rmtree(out / "checkpoint-4")
    assert largest_difference(zero, train(kit, out, *more, config="zero3.json")) == 0.0
    for directory in (tmp_path / "plain", out):
        assert merge([str(directory), str(directory / "merged")]) == 0
    one, two = (
        JanusVLN.from_pretrained(directory / "merged").eval() for directory in (tmp_path / "plain", out)
    )
    assert (logits(one) - logits(two)).abs().max() < 1e-3


def test_a_torn_pair_of_files_is_not_merged(
    kit: Kit, tmp_path: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(trained, tmp_path / "checkpoint")
    weights = load_file(checkpoint / "adapter_model.safetensors")
    save_file(
        {name.replace(".layers.1.", ".layers.9."): weight for name, weight in weights.items()},
        checkpoint / "adapter_model.safetensors",
    )
    assert merge([str(checkpoint), str(tmp_path / "out")]) != 0
    assert "which its base does not hold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

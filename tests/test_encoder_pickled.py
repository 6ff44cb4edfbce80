"""`convert-checkpoint`: the weights of a pickle, bit for bit, and nothing else that a pickle can do."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vggt_cache.cli import main
from vggt_cache.encoder import Checkpoint, EncoderConfig, pickled
from vggt_cache.wrap.weights import ModuleWeights
from vggt_module import with_golden_weights


def official(small_checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(small_checkpoint / "model.safetensors")


@pytest.mark.parametrize("form", ["in a model", pytest.param("below a key", marks=pytest.mark.slow), "half"])
def test_the_weights_of_a_pickle_become_a_checkpoint_with_the_same_digest(
    form: str, small_checkpoint: Path, tmp_path: Path
) -> None:
    weights = official(small_checkpoint)
    if form == "half":
        weights = {name: weight.half() for name, weight in weights.items()}
    saved: dict[str, object] = {
        "in a model": {f"spatial_encoder.vggt_model.{name}": weight for name, weight in weights.items()},
        "below a key": {"state_dict": {f"module.{n}": w for n, w in weights.items()}, "epoch": 3},
    }.get(form, {**weights, "camera_head.x": torch.zeros(3)})
    torch.save(saved, tmp_path / "model.pt")
    assert main(["convert-checkpoint", str(tmp_path / "model.pt"), str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors"]
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert all(written[name].dtype == weights[name].dtype for name in weights)
    made, given = Checkpoint.open(str(tmp_path / "out")), Checkpoint.open(str(small_checkpoint))
    assert made.config == given.config
    assert (made.weights_digest() == given.weights_digest()) == (form != "half")


def test_weights_are_rounded_as_a_trainer_does_it(
    small_checkpoint: Path, small_config: EncoderConfig, tmp_path: Path
) -> None:
    """So that what is precomputed from them is found by the module in its model."""
    out = str(tmp_path / "out")
    assert main(["convert-checkpoint", str(small_checkpoint), out, "--dtype", "bfloat16"]) == 0
    module = with_golden_weights(small_config).bfloat16()
    assert Checkpoint.open(out).weights_digest() == ModuleWeights(module, -2).spec("bfloat16").weights_digest


class Harm:
    """Unpickling it in full would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (self.folder,)


@pytest.mark.promise("Never run")
def test_a_pickle_that_does_more_than_hold_weights_is_refused_and_does_nothing(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({**official(small_checkpoint), "x": Harm(tmp_path / "made")}, tmp_path / "model.pt")
    assert main(["convert-checkpoint", str(tmp_path / "model.pt"), str(tmp_path / "out")]) == 2
    assert (
        "cannot be loaded as weights alone (it names posix.mkdir, which is no tensor)"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "made").exists()
    assert os.listdir(tmp_path / "out") == []


def test_what_is_no_vggt_or_no_pickle_and_places_that_are_taken_are_refused_in_a_sentence(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(source: Path, directory: Path) -> str:
        assert main(["convert-checkpoint", str(source), str(directory)]) == 2
        text = capsys.readouterr().err
        assert text.count("\n") == 1
        return text

    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "other.pt")
    (tmp_path / "torn.pt").write_bytes(b"\x80\x04")
    assert "has weights named head.weight, where exactly one aggregator" in refusal(
        tmp_path / "other.pt", tmp_path / "out"
    )
    assert "cannot be loaded as weights alone" in refusal(tmp_path / "torn.pt", tmp_path / "out")
    assert "there is no" in refusal(tmp_path / "absent.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds neither model.safetensors" in refusal(tmp_path / "empty", tmp_path / "out")
    before = json.loads((small_checkpoint / "config.json").read_text())
    assert "is not written over" in refusal(tmp_path / "other.pt", small_checkpoint)
    assert json.loads((small_checkpoint / "config.json").read_text()) == before


def test_a_dictionary_that_holds_itself_is_a_sentence(tmp_path: Path) -> None:
    around: dict[str, object] = {"a": torch.zeros(2)}
    around["again"] = around
    torch.save(around, tmp_path / "model.pt")
    here, there = multiprocessing.Pipe(duplex=False)
    pickled._write(str(tmp_path / "model.pt"), str(tmp_path), None, there)
    assert b"holds a dictionary that holds itself" in here.recv_bytes()

"""What a run leaves can be used alone, whatever form of directory its model came from."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.data.images import QwenPixels
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN
from janusvln.train.command import main
from train_kit import Kit

SAVING: list[object] = ["--save_strategy", "steps", "--save_steps", 1, "--max_steps", 1]
STD = [0.5, 0.25, 0.125]
"""Not the processor's own default: what is lost shows."""


def settings(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "preprocessor_config.json").read_text())
    return {**found, "image_std": STD}


def of_today(directory: Path) -> None:
    (directory / "preprocessor_config.json").write_text(json.dumps(settings(directory)))


def nested(directory: Path) -> None:
    """As a processor that transformers 5 saves: one file for images, videos and prompts."""
    fields = {"image_processor": settings(directory), "processor_class": "Qwen2_5_VLProcessor"}
    (directory / "processor_config.json").write_text(json.dumps(fields))
    (directory / "preprocessor_config.json").unlink()


def early(directory: Path) -> None:
    """As the first Qwen2.5-VL directories were."""
    fields = {**settings(directory), "image_processor_type": "Qwen2_5_VLImageProcessor"}
    size = fields.pop("size")
    fields |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (directory / "preprocessor_config.json").write_text(json.dumps(fields))
    template = (directory / "chat_template.jinja").read_text()
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    (directory / "chat_template.jinja").unlink()


def train_from(kit: Kit, model: object, output_dir: Path, *more: object) -> None:
    flags = kit.flags(output_dir, *SAVING, *more)
    flags[flags.index("--model_name_or_path") + 1] = str(model)
    assert main(flags) == 0


def check_usable_alone(saved: Path, source: Path) -> None:
    assert torch.equal(QwenPixels(str(saved))._table, QwenPixels(str(source))._table)
    assert QwenPixels(str(saved)).limits == QwenPixels(str(source)).limits
    assert list(Qwen2VLImageProcessorPil.from_pretrained(saved).image_std) == STD
    texts = [path.read_text() for path in saved.glob("*processor_config.json")]
    assert texts
    assert not any(
        "Qwen2_5_VLImageProcessor" in text for text in texts
    )  # which no transformers finds any more
    for template in source.glob("chat_template.*"):
        assert (saved / template.name).read_text() == template.read_text()
    AutoTokenizer.from_pretrained(saved)
    JanusVLN.from_pretrained(saved)


@pytest.mark.parametrize(
    "form",
    [pytest.param(of_today, marks=pytest.mark.slow), nested, pytest.param(early, marks=pytest.mark.slow)],
)
def test_the_processors_settings_are_beside_every_saved_model(
    kit: Kit, tmp_path: Path, form: Callable[[Path], None]
) -> None:
    source = shutil.copytree(kit.qwen, tmp_path / "source")
    form(source)
    train_from(kit, source, tmp_path / "out")
    for saved in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
        check_usable_alone(saved, source)
    # And it can be trained on by itself.
    train_from(kit, tmp_path / "out", tmp_path / "on")
    check_usable_alone(tmp_path / "on", source)


def test_a_model_of_the_hub_is_taken_from_where_the_user_said_by_every_loader(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is not there: whoever asks it, or another cache, fails."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = shutil.copytree(kit.qwen, tmp_path / "hub" / "snapshot")
    of_today(snapshot)
    asked = []

    def download(repository: str, *, cache_dir: str, **_: Any) -> str:
        asked.append((repository, cache_dir))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    train_from(kit, "Some/Qwen", tmp_path / "out", "--cache_dir", tmp_path / "hub")
    assert asked == [("Some/Qwen", str(tmp_path / "hub"))]
    check_usable_alone(tmp_path / "out", snapshot)


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_files_have_the_modes_that_the_umask_leaves(kit: Kit, tmp_path: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        train_from(kit, kit.qwen, tmp_path / "out")
    finally:
        os.umask(former)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "optimizer.pt", "preprocessor_config.json"}
    wrong = {path.name for path in files if stat.S_IMODE(path.stat().st_mode) != 0o666 & ~umask}
    assert wrong == set()


def test_earlier_checkpoints_go_when_the_disk_holds_the_new_one(
    kit: Kit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could take both."""
    synced: set[str] = set()
    torn: dict[str, set[str]] = {}
    fsync, remove = os.fsync, shutil.rmtree

    def noting_fsync(fd: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def noting_remove(path: str, *args: Any, **more: Any) -> None:
        if Path(path).name == "checkpoint-1":
            new = Path(path).with_name("checkpoint-2")
            torn[Path(path).name] = {str(found) for found in (new, *new.rglob("*"))} - synced
        remove(path, *args, **more)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(shutil, "rmtree", noting_remove)
    assert main(kit.flags(tmp_path / "out", *SAVING[:-1], 2, "--save_total_limit", 1)) == 0
    assert torn == {"checkpoint-1": set()}
    assert (tmp_path / "out" / "checkpoint-2" / "trainer_state.json").exists()

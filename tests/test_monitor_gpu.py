"""Cards are asked for in the first way that answers, and a machine without any is no error."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from vggt_cache.monitor.gpu import Gpu, GpuReader, read_nvidia_smi
from vggt_cache.monitor.progress import Progress
from vggt_cache.monitor.render import Look, json_line, plain_line

GIB = 2**30
CARD = Gpu(
    index=0, name="NVIDIA H800", memory_used_bytes=61 * GIB, memory_total_bytes=80 * GIB, use_percent=97.0
)


def fake_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A nvidia-smi that does as told, the only one on the path; it notes each call."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho called >> '{folder}/calls'\n{body}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return folder / "calls"


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)


def test_without_a_driver_there_are_no_cards_and_no_complaint(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert GpuReader().read() == []
    assert capfd.readouterr() == ("", "")


def test_a_tool_that_fails_is_not_asked_again(tmp_path, monkeypatch):
    calls = fake_tool(tmp_path, monkeypatch, "echo 'Failed to initialize NVML' ; exit 9")
    reader = GpuReader()
    assert [reader.read(), reader.read()] == [[], []]
    assert calls.read_text() == "called\n"


def test_the_tools_answer_is_read(tmp_path, monkeypatch):
    fake_tool(
        tmp_path, monkeypatch,
        "echo '0, NVIDIA H800, 62464, 81920, 97'; echo '1, NVIDIA A100, 80GB, [N/A], 81920, [N/A]'",
    )  # fmt: skip
    first, second = GpuReader().read()
    assert first == CARD
    assert (second.name, second.memory_used_bytes, second.use_percent) == ("NVIDIA A100, 80GB", None, None)
    assert read_nvidia_smi() == [first, second]


class FakeError(Exception):
    pass


def fake_nvml(*, refuses: str = "") -> types.ModuleType:
    module = types.ModuleType("pynvml")
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: b"NVIDIA H800",
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(used=61 * GIB, total=80 * GIB),
        "nvmlDeviceGetUtilizationRates": lambda handle: types.SimpleNamespace(gpu=97, memory=3),
    }

    def refuse(*_: object) -> None:
        raise FakeError("Not Supported")

    for name, answer in answers.items():
        setattr(module, name, refuse if name == refuses else answer)
    module.NVMLError = FakeError  # type: ignore[attr-defined]
    return module


def test_nvml_is_asked_first(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert GpuReader().read() == [CARD]


def test_what_a_card_does_not_tell_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(refuses="nvmlDeviceGetUtilizationRates"))
    (card,) = GpuReader().read()
    assert (card.use_percent, card.memory_used_bytes) == (None, 61 * GIB)


def test_nvml_that_does_not_start_is_followed_by_the_tool(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(refuses="nvmlInit"))
    fake_tool(tmp_path, monkeypatch, "echo '0, NVIDIA H800, 62464, 81920, 97'")
    assert GpuReader().read() == [CARD]


def test_cards_are_in_the_line_and_in_json():
    known = Progress(step=3, total=9, s_per_it=2.0, last_step_at_s=0.0)
    assert plain_line(known, [CARD]).endswith(" | GPU memory: 61.0 GiB at most | GPU use: 97%")
    look = Look(progress=known, alarms=[], gpus=[CARD], notes=[], now_s=0.0)
    assert json.loads(json_line(look))["gpus"][0]["memory_used_bytes"] == 61 * GIB

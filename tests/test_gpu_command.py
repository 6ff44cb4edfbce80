"""The command for a GPU, on a CPU: every step runs dry, a failure costs itself only, what it says of figures is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
ABSENT = ("deepspeed", "zstandard", "flash_attn", "tensorboard", "torchao")
WITHOUT = f"""
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {ABSENT} else super().find_spec(name, path, target)

sys.meta_path = [Without if one is importlib.machinery.PathFinder else one for one in sys.meta_path]
"""
"""Python runs it at every start: these packages are not there."""


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("gpu", "gpu_rows", "gpu_expected", "gpu_steps", "table", "peers"):
            del sys.modules[name]


# ---------------------------------------------------------------- all of it, dry


def dry_name(figure: str) -> str:
    """The name under which a dry run has a figure that goals and predictions know at full size."""
    full_and_dry = {
        "518": "70", "644": "70", "full_": "refused_", "capped_": "refused_", "5x9": "3x2", "frame_l": "causal_l",
    }  # fmt: skip
    for full, dry in full_and_dry.items():
        figure = figure.replace(full, dry)
    return figure


@pytest.mark.slow  # a minute; to be run whenever the command or what it calls has changed
@pytest.mark.timeout(900)
def test_a_dry_run_gives_every_figure_without_optional_packages(tmp_path: Path) -> None:
    import gpu
    import gpu_rows
    from gpu_expected import GOALS, PREDICTIONS

    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "sitecustomize.py").write_text(WITHOUT)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "without"), "OUT": str(tmp_path / "out")}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    out = tmp_path / "out" / "dry"
    lines = gpu_rows.notes.lines(out)
    assert [line for line in lines if "error" in line] == []
    assert {line["step"] for line in lines if line.get("ended") == 0} == {step.name for step in gpu.STEPS}
    assert done.returncode == 0, done.stdout + done.stderr

    figures = gpu_rows.notes.read(out)
    assert figures["machine"]["software"].keys() >= {"deepspeed", "zstandard"}
    assert figures["training"]["causal_cached"]["cache_hit_rate"] == [1.0]
    assert figures["training"]["causal_largest_difference"] < 1e-4
    assert figures["memory"]["refused_frames"]["halved_to"]
    assert gpu_rows.figure(figures, "memory.refused_lists.missing") == 0
    named = {one.figure for one in (*GOALS, *PREDICTIONS)}
    unknown = {name for name in named if gpu_rows.figure(figures, dry_name(name)) is None}
    # A CPU has no such kernels.
    assert unknown == {f"parity.{width}_fused_against_plain" for width in (518, 644)}
    assert {result["theme"] for result in gpu_rows.results(figures)} == {
        "gpu", "encoder", "causal", "precompute", "step",
    }  # fmt: skip
    refused = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_rows.py"), str(out), "--write"], capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "dry run" in refused.stderr


# ---------------------------------------------------------------- steps that end otherwise

FAKE = """
import subprocess, sys, time

def run_well(notes):
    notes.tell("figure", 1)

def run_bad(notes):
    notes.tell("before", 2)
    raise ValueError("the reason")

def run_partly(notes):
    notes.measure("first", lambda: 1 / 0)
    notes.measure("second", lambda: 3)

def run_late(notes):
    notes.tell("before", 4)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    notes.tell("child", child.pid)
    time.sleep(600)
"""


def run_fakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str, **options: Any
) -> tuple[bool, list[Any]]:
    """Steps whose modules are made here."""
    import gpu

    for name in names:
        source = f"{FAKE}\ndef run(setting, notes):\n    run_{name}(notes)\n"
        (tmp_path / f"fake_{name}.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # Long enough for a start on a busy machine; the late one sleeps for much longer.
    limits_s = {name: 20 if name == "late" else 60 for name in names}
    steps = [
        gpu.Step(name=name, module=f"fake_{name}", limit_s=limit_s) for name, limit_s in limits_s.items()
    ]
    well = gpu.run_all(steps, tmp_path / "out", **options)
    return well, gpu_lines(tmp_path)


def gpu_lines(tmp_path: Path) -> list[dict[str, Any]]:
    text = (tmp_path / "out" / "figures.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def ended(lines: list[dict[str, Any]]) -> dict[str, Any]:
    return {line["step"]: line["ended"] for line in lines if "ended" in line}


def test_a_step_that_fails_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    well, lines = run_fakes(tmp_path, monkeypatch, "bad", "partly", "well")
    assert not well
    assert ended(lines) == {"bad": 1, "partly": 1, "well": 0}
    assert {"step": "bad", "name": "before", "value": 2} in lines
    assert {"step": "partly", "name": "second", "value": 3} in lines
    errors = {line["step"]: line["error"] for line in lines if "error" in line}
    assert errors == {"bad": "ValueError: the reason", "partly": "ZeroDivisionError: division by zero"}


@pytest.mark.slow
def test_a_step_is_killed_whole_at_its_limit_and_keeps_what_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well, lines = run_fakes(tmp_path, monkeypatch, "late", "well", budget_s=86)
    assert not well
    assert ended(lines) == {"late": None, "well": 0}
    assert {"step": "late", "name": "before", "value": 4} in lines
    (child,) = (line["value"] for line in lines if line.get("name") == "child")
    deadline_s = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline_s, "what the step started is still there"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Not as a zombie, which waits for whoever adopted it."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_a_step_for_which_no_time_is_left_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    well, lines = run_fakes(tmp_path, monkeypatch, "well", budget_s=7)
    assert not well
    assert lines == [{"step": "well", "skipped": "no time was left"}]


def test_the_limits_fit_the_time_that_the_command_has_and_each_step_says_why_it_is_there() -> None:
    import gpu

    assert sum(step.limit_s for step in gpu.STEPS) <= gpu.BUDGET_S
    assert gpu.__doc__ is not None
    assert [step.name for step in gpu.STEPS if f"\n    {step.name} " not in gpu.__doc__] == []


# ---------------------------------------------------------------- what the figures say

SPEED = {"frames_per_s": 225.0, "flop_per_s": 4.6e14, "batch_size": 16, "share": 0.58}
WALK = {
    "features_per_s": 40.0, "frame_passes_per_s": 200.0, "flop_per_s": 4.2e14, "samples": 40, "shared_s": 1.5,
    "published_s": 12.0, "ratio": 0.125, "times_as_fast": 8.0, "frame_passes_shared": 300,
    "frame_passes_published": 504, "tower_passes_shared": 60, "ratio_of_flops": 0.4, "of_frame_efficiency": 0.93,
}  # fmt: skip
MACHINE = {"gpu": "NVIDIA H100 80GB HBM3", "cores": 16, "cpu": "some"}


def told(folder: Path, **figures: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    with open(folder / "figures.jsonl", "a") as file:
        for step, found in figures.items():
            for name, value in found.items():
                file.write(json.dumps({"step": step, "name": name, "value": value}) + "\n")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return told(
        tmp_path / "run",
        machine={"machine": MACHINE, "hardware": "h100", "device_copy_bytes_per_s": 3.1e12},
        frame={
            "configuration": {"size": "1b", "compute_dtype": "bfloat16", "widths": [518]},
            "peak_before": 8e14, "peak_after": 7.6e14, "518": SPEED, "518_cudnn_batch_16": SPEED,
            "518_plain": {"share": 0.45},
            "644_cudnn_batch_16": {"share": 0.3},
        },
        causal={"518_flash": WALK, "518": {**WALK, "times_as_fast": 5.0}},
    )  # fmt: skip


def test_each_goal_and_prediction_stands_beside_its_figure_with_the_verdict(run: Path) -> None:
    import gpu_rows

    text = "\n".join(gpu_rows.report(run))
    for line in (
        "| frame.518.share | >= 0.6 | 0.58 | **missed** |",
        "| frame.644.share | >= 0.6 | not measured |  |",
        "| causal.518.times_as_fast | >= 6 | 5 | **missed** |",
        "| causal.518.of_frame_efficiency | >= 0.9 | 0.93 | reached |",
    ):
        assert line in text
    assert "| 3e+12 | 3.1e+12 | right |" in text
    assert "| 0.3 | 0.45 | **wrong** |" in text
    assert "| 0.6 | 0.3 | **wrong** |" in text
    assert "| 0.61 | 0.58 | right |" in text


def test_the_rows_are_those_of_the_benchmarks_over_the_mean_peak(run: Path) -> None:
    import gpu_rows

    text = "\n".join(gpu_rows.report(run))
    share, card = f"{100 * 4.6 / 7.8:.0f}", MACHINE["gpu"]
    frame, causal = (
        next(line for line in text.splitlines() if f"{context} context, 518 wide" in line)
        for context in ("frame", "causal")
    )
    assert f"225.00 frame passes/s, **{share} %**" in frame
    assert "780.00 TFLOP/s" in frame
    assert frame.endswith(f"| {card} |")
    assert "200.00 frame passes/s" in causal
    assert "40-step episode" in text
    assert "precompute end to end" not in text  # it was not run


def test_a_width_without_its_episode_is_no_result(run: Path) -> None:
    """A document's table of the encoder needs both contexts at both widths."""
    import gpu_rows

    told(run, frame={"configuration": {"size": "1b", "compute_dtype": "bfloat16", "widths": [518, 644]}})
    assert [one["theme"] for one in gpu_rows.results(gpu_rows.notes.read(run))] == ["gpu", "causal"]


def test_a_repeated_step_counts_with_its_later_figures(run: Path) -> None:
    import gpu_rows

    told(run, frame={"518": {**SPEED, "share": 0.66}})
    assert "| frame.518.share | >= 0.6 | 0.66 | reached |" in "\n".join(gpu_rows.report(run))


def test_a_run_is_written_as_results_of_their_themes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_rows

    monkeypatch.setattr(gpu_rows, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_rows.py", str(run), "--write"])
    assert gpu_rows.main() == 0
    written = {
        path.name.split("_")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*_h100_*.json")
    }
    assert written.keys() == {"gpu", "encoder", "causal"}
    assert written["gpu"]["figures"]["frame"]["518"] == SPEED
    assert written["causal"]["machine"] == MACHINE

"""scripts/precompute_multi_gpu.sh: one process a GPU, flags and signals passed on, codes collected."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "precompute_multi_gpu.sh"

# Stands for Python: writes down what it was started with, then ends with the code in $CODES for its GPU. The line is
# written in one piece, because several interpreters write theirs at the same moment.
INTERPRETER = """#!/bin/sh
trap 'echo "$1 INT" >> "$SEEN.signals"; sleep 0.3; echo committed; exit 130' INT
trap 'echo "$1 TERM" >> "$SEEN.signals"; sleep 0.3; echo committed; exit 143' TERM
printf '%s\\n' "$(printf '%s|' "$CUDA_VISIBLE_DEVICES" "$@")" >> "$SEEN"
printf 'Processing: 10%%\\rProcessing: 100%%\\n'
[ -n "$HOLD" ] && while :; do sleep 0.05; done
eval "exit \\${CODE_$(printf %s "$CUDA_VISIBLE_DEVICES" | tr -dc 0-9A-Za-z):-0}"
"""


class Launch:
    """Runs the script with a stand-in for Python, and for nvidia-smi if `gpus` is given."""

    def __init__(self, folder: Path, *flags: str, gpus: int | None = None, **environment: str) -> None:
        self.folder = folder
        self.seen = folder / "seen"
        interpreter = self._tool("interpreter", INTERPRETER)
        inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        environment = {**inherited, "PYTHON": str(interpreter), "SEEN": str(self.seen), **environment}
        if gpus is not None:
            listing = "".join(f"echo 'GPU {i}: NVIDIA'\n" for i in range(gpus))
            self._tool("nvidia-smi", f"#!/bin/sh\n{listing}")
            environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT), *flags], cwd=folder, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def _tool(self, name: str, text: str) -> Path:
        path = self.folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def finish(self) -> int:
        self.out, self.err = self.process.communicate(timeout=60)
        return self.process.returncode

    def started(self) -> list[list[str]]:
        """What each process saw: CUDA_VISIBLE_DEVICES, then its arguments."""
        lines = self.seen.read_text().splitlines() if self.seen.exists() else []
        return sorted(line.removesuffix("|").split("|") for line in lines)


def test_one_process_is_started_for_each_gpu_of_the_machine(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", gpus=3)
    assert launch.finish() == 0, launch.err
    assert [seen[0] for seen in launch.started()] == ["0", "1", "2"]
    for seen in launch.started():
        assert seen[1].endswith("scripts/precompute_vggt_features.py")
        assert seen[2:] == ["--cache_dir", "c", "--device", "cuda:0"]


def test_visible_devices_are_respected_and_may_be_names(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir=c", gpus=8, CUDA_VISIBLE_DEVICES="5,GPU-ab12")
    assert launch.finish() == 0
    assert [seen[0] for seen in launch.started()] == ["5", "GPU-ab12"]


def test_arguments_with_blanks_and_stars_arrive_as_they_are(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "my cache", "--data_root", "a *", "", CUDA_VISIBLE_DEVICES="0")
    assert launch.finish() == 0
    assert launch.started()[0][2:] == [
        "--cache_dir",
        "my cache",
        "--data_root",
        "a *",
        "",
        "--device",
        "cuda:0",
    ]
    assert len(list((tmp_path / "my cache.logs").glob("*-0.log"))) == 1


def test_logs_are_beside_the_cache_and_their_last_line_is_shown(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache-dir", "out/cache/", CUDA_VISIBLE_DEVICES="0,1")
    assert launch.finish() == 0
    logs = sorted((tmp_path / "out" / "cache.logs").iterdir())
    assert len(logs) == 2
    assert all("Processing: 100%" in log.read_text() for log in logs)
    assert not (tmp_path / "out" / "cache").exists()
    assert "process 1 on GPU 1: exit code 0: Processing: 100%" in launch.out
    other = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="0", LOG_DIR="elsewhere")
    assert other.finish() == 0
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_progress_is_reported_while_processes_run(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="7", HOLD="1", PROGRESS_S="0")
    assert launch.process.stdout is not None
    lines = [launch.process.stdout.readline() for _ in range(2)]
    launch.process.send_signal(signal.SIGTERM)
    launch.finish()
    assert lines[1] == "[INFO] process 0 on GPU 7: Processing: 100%\n"


@pytest.mark.parametrize(
    ("codes", "worst"), [({}, 0), ({"CODE_1": "3"}, 3), ({"CODE_0": "1", "CODE_2": "3"}, 3)]
)
def test_the_exit_code_is_the_largest(codes: dict[str, str], worst: int, tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="0,1,2", **codes)
    assert launch.finish() == worst


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_each_process_once_and_all_are_waited_for(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="0,1", HOLD="1")
    deadline = time.monotonic() + 30
    while len(launch.started()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    launch.process.send_signal(number)
    assert launch.finish() == code
    signals = (tmp_path / "seen.signals").read_text().split()
    assert signals.count(number.name.removeprefix("SIG")) == 2
    logs = sorted((tmp_path / "c.logs").iterdir())
    assert [log.read_text().splitlines()[-1] for log in logs] == ["committed", "committed"]


def test_without_a_gpu_the_number_of_processes_must_be_given(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="")
    assert launch.finish() == 2
    assert launch.err.startswith("[ERROR] no GPU is visible")
    assert launch.err.count("\n") == 1
    cpu = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="-1", NUM_PROCS="2")
    assert cpu.finish() == 0
    assert [seen[-2:] for seen in cpu.started()] == [["--device", "cpu"]] * 2
    assert [seen[0] for seen in cpu.started()] == ["", ""]


def test_more_processes_than_gpus_share_them_in_turn(tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", gpus=2, NUM_PROCS="3")
    assert launch.finish() == 0
    assert [seen[0] for seen in launch.started()] == ["0", "0", "1"]


@pytest.mark.parametrize("count", ["0", "two", "-1", "1.5"])
def test_a_nonsensical_number_of_processes_is_refused(count: str, tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", CUDA_VISIBLE_DEVICES="0", NUM_PROCS=count)
    assert launch.finish() == 2
    assert f"NUM_PROCS is '{count}'" in launch.err
    assert launch.started() == []


@pytest.mark.parametrize("flags", [["--device", "cuda:1"], ["--device=cuda:1"]])
def test_a_device_flag_is_refused_before_anything_is_started(flags: list[str], tmp_path: Path) -> None:
    launch = Launch(tmp_path, "--cache_dir", "c", *flags, CUDA_VISIBLE_DEVICES="0,1")
    assert launch.finish() == 2
    assert launch.err.startswith("[ERROR] --device is chosen by this script")
    assert launch.started() == []
    assert not (tmp_path / "c.logs").exists()

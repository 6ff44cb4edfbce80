"""The command and the script: what they print, for which logs, and how they end."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from monitor_kit import BANNER, ENDED, ORIGINAL_TRAINER, TOTAL, bar, metrics, training_log
from vggt_cache.cli import main
from vggt_cache.monitor import MonitorSettings
from vggt_cache.monitor import run as run_module
from vggt_cache.monitor.gpu import Gpu
from vggt_cache.monitor.logs import WatchedLog
from vggt_cache.monitor.progress import alarms_of
from vggt_cache.monitor.render import Look, table_of
from vggt_cache.monitor.run import monitor

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "monitor_training.sh"
DOCUMENT = (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")
PLAIN = re.compile(
    r"^\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] Step: \d+ \| Speed: [\d.]+s/it \| Throughput: [\d.]+ steps/s"
)
CACHED = {"cache_hit_rate": 0.9996, "cache_wait_ms": 1.25, "cache_read_mb_per_s": 900.0, "encode_ms": 0.0}
CACHED |= {"samples_per_s": 3.4, "slowest_rank": 5, "slowest_rank_s": 18.9}

FINISHED = training_log(TOTAL % 1000, total=TOTAL % 1000) + ENDED


@pytest.fixture(autouse=True)
def no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cards of the machine that runs the tests are nobody's business."""
    monkeypatch.setattr(run_module, "GpuReader", lambda: NoCards())


class NoCards:
    def read(self) -> list[Gpu]:
        return []


def written(path: Path, text: str, *, age_s: float = 5.0) -> Path:
    """A log whose last line was written so long ago."""
    path.write_text(text)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def once(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["monitor", *map(str, arguments), "--once"])
    return code, *capsys.readouterr()


# ---------------------------------------------------------------- once


def test_the_line_is_in_the_guides_style_with_a_true_quotient(tmp_path, capsys):
    log = written(tmp_path / "train.log", training_log(150, **CACHED))
    code, out, _ = once(capsys, log)
    assert code == 0
    assert PLAIN.match(out)
    assert "] Step: 150 | Speed: 18.5s/it | Throughput: 0.0541 steps/s | Total: 28710 | " in out
    for field in (
        "Overall: 18.5s/it", "Samples: 3.4/s", "Loss: 0.0133", "LR: 2e-05", "Grad norm: 1.5", "Hit rate: 99.9%",
        "Wait: 1.25 ms", "Encode: 0 ms", "Read: 900 MB/s", "Slowest rank: 5", "Left: 146:",
    ):  # fmt: skip
        assert field in out, field


@pytest.mark.parametrize(
    ("text", "age_s", "status", "kinds"),
    [
        (training_log(150, **CACHED), 5, "running", []),
        (training_log(150, **CACHED), 5000, "stalled", ["stall"]),
        (FINISHED, 1e6, "ended", []),
        (training_log(40, total=40), 1e6, "finishing", []),
        (ORIGINAL_TRAINER, 5, "running", []),
        (training_log(50) + metrics(4, loss=float("nan"), grad_norm=1.0), 5, "running", ["not_finite"]),
        ("", 5, "waiting", []),
        ("loading the model\n", 5000, "waiting", []),
        (training_log(9) + "[ERROR] the cache lacks sample 3\n", 5, "running", ["failure"]),
    ],
)
def test_json_is_valid_and_every_key_is_documented(tmp_path, capsys, text, age_s, status, kinds):
    code, out, _ = once(capsys, written(tmp_path / "train.log", text, age_s=age_s), "--json")
    (line,) = out.splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["status"] == status
    assert (found["left_s"] is None) == (status in ("stalled", "waiting"))
    assert [warning["kind"] for warning in found["warnings"]] == kinds
    assert code == bool(kinds)
    documented = set(re.findall(r"^\| `(\w+)`", DOCUMENT, re.MULTILINE))
    assert set(found) <= documented
    assert "warnings" in documented


def test_an_empty_log_is_said_to_be_empty(tmp_path, capsys):
    log = written(tmp_path / "train.log", "")
    assert once(capsys, log) == (0, f"[INFO] There is nothing in {log} yet: it is empty\n", "")


def test_a_finished_log_says_so(tmp_path, capsys):
    code, out, _ = once(capsys, written(tmp_path / "train.log", FINISHED, age_s=1e6))
    assert code == 0
    assert "[INFO] The run has ended after 2 min 3 s" in out


def test_warnings_are_lines_and_an_exit_code(tmp_path, capsys):
    log = written(tmp_path / "train.log", training_log(50) + metrics(loss=float("nan")), age_s=4000)
    code, out, _ = once(capsys, log)
    assert code == 1
    assert re.search(r"^\[WARN\] loss is nan near step 50 \(1 line of those read\)", out, re.MULTILINE)
    assert re.search(r"^\[WARN\] no new step for 1 h 6 min \(usual: 18.5 s\)", out, re.MULTILINE)
    assert [line.startswith("[WARN]") for line in out.splitlines()] == [True, True, False]  # they stand first
    assert "Left" not in out  # no time is left over for a run that does not go on


@pytest.mark.parametrize("name", ["nowhere.log", "nothing_*.log", "."])
def test_no_log_is_one_sentence_and_exit_code_2(tmp_path, capsys, name):
    code, out, err = once(capsys, tmp_path / name)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith(
        f"[ERROR] no log matches {tmp_path / name}, so there is nothing to show: give a log"
    )


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = once(capsys, tmp_path / "pipe")
    assert code == 2
    assert "pipe is not a regular file, so there is no end to read: give a log file" in err


def test_an_unreadable_log_is_one_sentence(tmp_path, capsys, monkeypatch):
    log = written(tmp_path / "train.log", training_log(3))

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("vggt_cache.monitor.tail.os.open", refuse)
    code, _, err = once(capsys, log)
    assert code == 2
    assert f"[ERROR] {log} cannot be read (Permission denied)" in err


def test_wrong_flags_are_refused(capsys):
    assert main(["monitor", "x", "--interval", "0"]) == 2
    assert "[ERROR] --interval 0 is not a time to wait" in capsys.readouterr().err


def test_flags_have_both_spellings(tmp_path, capsys):
    log = written(tmp_path / "train.log", training_log(50), age_s=60)
    assert once(capsys, log, "--stall_s", 30)[0] == 1
    assert once(capsys, log, "--stall-s", 300)[0] == 0
    assert "Samples: 3.46/s" in once(capsys, log, "--samples-per-step", 64)[1]


# ---------------------------------------------------------------- which log


def test_of_several_logs_the_one_whose_bar_moved_last_is_shown(tmp_path, capsys):
    written(tmp_path / "train_1.log", FINISHED, age_s=1000)
    written(tmp_path / "train_2.log", training_log(30), age_s=50)
    written(tmp_path / "node1.log", "[rank8]: a warning, and no bar\n", age_s=1)
    for names in (["train_1.log", "train_2.log", "node1.log"], ["*.log"], ["."]):
        code, out, _ = once(capsys, *(tmp_path / name for name in names))
        assert (code, out.count("Step:")) == (0, 1)
        assert "Step: 30 |" in out


def test_an_error_on_another_node_is_reported(tmp_path, capsys):
    written(tmp_path / "node0.log", training_log(30), age_s=50)
    other = written(tmp_path / "node1.log", "[rank8]: RuntimeError: NCCL timeout\n", age_s=10)
    code, out, _ = once(capsys, tmp_path)
    assert code == 1
    assert f"[WARN] since the last step the log reports: RuntimeError: NCCL timeout ({other})" in out


def test_an_error_of_an_earlier_start_is_not(tmp_path, capsys):
    written(tmp_path / "a.log", "RuntimeError: no such checkpoint\n", age_s=500)
    written(tmp_path / "b.log", training_log(30), age_s=5)
    assert once(capsys, tmp_path)[0] == 0


def test_a_name_with_brackets_is_taken_as_it_is(tmp_path, capsys):
    (tmp_path / "lr[1e-5]").mkdir()
    log = written(tmp_path / "lr[1e-5]" / "train.log", training_log(30))
    assert "Step: 30" in once(capsys, log)[1]
    assert "Step: 30" in once(capsys, log.parent)[1]


def test_many_old_logs_are_not_all_opened(tmp_path, capsys, monkeypatch):
    opened = []
    real = os.open
    monkeypatch.setattr(
        "vggt_cache.monitor.tail.os.open", lambda path, *rest: opened.append(path) or real(path, *rest)
    )
    for number in range(40):
        written(tmp_path / f"{number}.log", training_log(number + 1), age_s=100 - number)
    assert "Step: 40 " in once(capsys, tmp_path)[1]
    assert len(opened) == 16


# ---------------------------------------------------------------- following


class Script:
    """Stands for time: does one thing at each wait, and then presses Ctrl-C."""

    def __init__(self, *actions: Callable[[], object]) -> None:
        self.actions = list(actions)
        self.now_s = time.time()

    def clock(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        if not self.actions:
            raise KeyboardInterrupt
        self.now_s += seconds
        self.actions.pop(0)()


def followed(
    capsys, pattern: object, *actions: Callable[[], object], interval: float = 10, **settings
) -> list[str]:
    script = Script(*actions)
    settings = MonitorSettings(logs=(str(pattern),), interval=interval, **settings)
    assert monitor(settings, clock=script.clock, wait=script.wait) == 0
    return capsys.readouterr().out.splitlines()


def test_a_log_is_waited_for_and_a_new_one_that_matches_is_taken_in(tmp_path, capsys):
    lines = followed(
        capsys,
        tmp_path / "train_*.log",
        lambda: None,
        lambda: (tmp_path / "train_1.log").write_text(training_log(30)),
        lambda: (tmp_path / "train_2.log").write_text("starting\n"),
        lambda: (tmp_path / "train_2.log").write_text("starting\n" + training_log(3)),
    )
    assert lines[0] == f"[INFO] Waiting for a log: nothing matches {tmp_path / 'train_*.log'} yet"
    assert ["Step: 30 " in lines[1], "Step: 3 " in lines[2], len(lines)] == [True, True, 3]


def test_a_line_for_each_new_step_and_a_warning_once(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text(training_log(30))
    append = log.open("a")

    def step(number: int) -> Callable[[], None]:
        return lambda: print(bar(number, 20 + 18.5 * number), end="", file=append, flush=True)

    nothing = [lambda: None] * 30
    lines = followed(capsys, log, step(31), *nothing, step(32), *nothing)
    append.close()
    subjects = [re.search(r"Step: \d+|no new step", line)[0] for line in lines]
    assert subjects == ["Step: 30", "Step: 31", "no new step", "Step: 32", "no new step"]


def test_json_is_one_object_at_each_look(tmp_path, capsys):
    log = tmp_path / "train.log"
    log.write_text(training_log(30))
    found = [json.loads(line) for line in followed(capsys, log, *[lambda: None] * 3, json=True)]
    assert [one["step"] for one in found] == [30] * 4


WRITER = """
import sys, time
sys.path.insert(0, sys.argv[2])
from monitor_kit import bar, metrics
with open(sys.argv[1], "a") as log:
    for step in range(1, 31):
        text = bar(step, 2 * step, total=30) + (metrics(loss=1 / step) if step % 5 == 0 else "")
        for part in (text[:20], text[20:]):
            log.write(part)
            log.flush()
            time.sleep(0.01)
"""


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vggt_cache", "monitor", *map(str, arguments)]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), **more}


def test_a_log_is_followed_while_another_process_writes_it(tmp_path):
    log = tmp_path / "train.log"
    with subprocess.Popen(
        command(log, "--interval", 0.05), text=True, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as watching:  # fmt: skip
        lines = [watching.stdout.readline()]
        subprocess.run([sys.executable, "-c", WRITER, str(log), str(ROOT / "tests")], check=True)
        while "Step: 30 " not in lines[-1]:
            lines.append(watching.stdout.readline())
            assert lines[-1]
        watching.send_signal(signal.SIGINT)
        rest, errors = watching.communicate()
    assert (watching.returncode, rest, errors) == (0, "", "")
    assert lines[0].startswith("[INFO] Waiting for a log")
    steps = [int(re.search(r"Step: (\d+)", line)[1]) for line in lines if "Step:" in line]
    assert steps == sorted(set(steps))
    assert len(steps) > 3
    assert "Speed: 2s/it" in lines[-1]


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    log = written(tmp_path / "train.log", training_log(30))
    with subprocess.Popen(
        command(log, "--json", "--interval", 0.02), text=True, env=environment(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as watching:  # fmt: skip
        assert watching.stdout.readline().startswith("{")
        watching.stdout.close()
        assert watching.stderr.read() == ""
        assert watching.wait() == 1


def test_a_terminal_gets_a_table_that_is_drawn_over(tmp_path):
    log = written(tmp_path / "train.log", training_log(150, **CACHED))
    ours, theirs = pty.openpty()
    watching = subprocess.Popen(
        command(log, "--interval", 0.05), stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True,
        env=environment(TERM="xterm", COLUMNS="100", LINES="40"),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    deadline = time.monotonic() + 60
    while shown.count(b"Throughput") < 3 and time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            shown += os.read(ours, 65536)
    watching.send_signal(signal.SIGINT)
    assert watching.wait(timeout=60) == 0
    os.close(ours)
    text = shown.decode(errors="replace")
    for part in (
        "┌",
        "150 of 28710 (0.5%)",
        "18.5s/it recent, 18.5s/it overall",
        "99.9%",
        "Slowest rank",
        "\x1b[1A",
    ):
        assert part in text, part
    assert "[2026" not in text


def on_a_terminal(look: Look) -> list[str]:
    """The lines of the table on 80 x 24, as tmux begins with."""
    console = Console(width=80, height=24, file=StringIO())
    console.print(table_of(look))
    return console.file.getvalue().splitlines()


def test_all_that_matters_of_8_gpus_fits_80_by_24_with_warnings_first(tmp_path):
    directory = f"/{'a long name/' * 12}"
    text = f"[INFO] VGGT feature cache enabled: {directory}\n[INFO] Coverage of this data set: 600000/612000 images\n"
    log = written(
        tmp_path / f"{'train' * 30}.log", text + training_log(150, **CACHED) + metrics(loss=float("nan"))
    )
    watched = WatchedLog(str(log))
    watched.refresh(1e9)
    progress = watched.progress(None)
    watched.tail.close()
    alarms = tuple(alarms_of(progress, MonitorSettings(logs=("x",)), 1e9 + 5000))
    assert [alarm.kind for alarm in alarms] == ["not_finite", "stall"]
    cards = [
        Gpu(
            index=n,
            name="NVIDIA H800",
            memory_used_bytes=(61 + n) << 30,
            memory_total_bytes=80 << 30,
            use_percent=100,
        )
        for n in range(8)
    ]
    look = Look(progress=progress, alarms=alarms, gpus=cards, notes=[], now_s=1e9)
    lines = on_a_terminal(look)
    assert len(lines) <= 24
    shown = " ".join(" ".join(lines).split())
    for part in (
        "150 of 28710", "18.5s/it recent", "3.4 samples/s", "146:", "gradient norm 1.5", "learning rate 2e-05",
        "hit rate 99.9%", "wait 1.25 ms", "encode 0 ms", "read 900 MB/s", "5, 18.9 s per step", "600000 of 612000",
        *(f"{n}: {61 + n}.0 of 80.0 GiB 100%" for n in range(8)),
    ):  # fmt: skip
        assert part in shown, part
    assert lines[1].startswith("[WARN] loss is nan")
    assert shown.rindex("[WARN]") < shown.index("150 of 28710")


# ---------------------------------------------------------------- the script


def script(*arguments: object, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **more},
    )  # fmt: skip


def test_the_script_runs_from_anywhere_and_takes_what_the_shell_made_of_a_pattern(tmp_path):
    (tmp_path / "a run").mkdir()
    written(tmp_path / "a run" / "train_1.log", BANNER + training_log(20), age_s=500)
    written(tmp_path / "a run" / "train_2.log", BANNER + training_log(30), age_s=5)
    line = f'bash "{SCRIPT}" "a run"/train_*.log --once'
    for arguments in (["bash", "-c", line], ["bash", str(SCRIPT), "a run/train_*.log", "--once"]):
        done = subprocess.run(
            arguments, cwd=tmp_path, capture_output=True, text=True,
            env={"PATH": os.environ["PATH"], "PYTHON": sys.executable},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert PLAIN.match(done.stdout)
        assert "Step: 30 |" in done.stdout


def test_the_script_without_a_log_is_one_sentence(tmp_path):
    done = script(cwd=tmp_path)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("[ERROR] no log is named")
    assert script("none.log", "--once", cwd=tmp_path).returncode == 2


def test_the_command_needs_no_torch():
    code = "import vggt_cache.monitor.run, rich.live, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.stdout == "False\n"


# ---------------------------------------------------------------- the document


def test_every_flag_is_documented(capsys):
    with pytest.raises(SystemExit):
        main(["monitor", "--help"])
    for flag in set(re.findall(r"--[a-z]+(?:_[a-z]+)*(?![-\w])", capsys.readouterr().out)) - {"--help"}:
        assert f"`{flag}`" in DOCUMENT or f"`{flag} " in DOCUMENT, flag

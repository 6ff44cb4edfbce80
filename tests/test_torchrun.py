"""torchrun as the launchers start it: real processes; what they say stays the last word, and their exit code counts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vggt_cache.cluster.network import free_port, wait_for_node_0
from vggt_cache.errors import SettingsError

ROOT = Path(__file__).resolve().parent.parent


def torchrun(folder: Path, program: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    given = ["--master_addr", "127.0.0.1", "--master_port", str(free_port()), "--nproc_per_node", "2", *flags]
    return subprocess.run(
        [sys.executable, "-m", "vggt_cache.cluster.torchrun", *given, str(folder / "program.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_refusal_keeps_its_exit_code_and_is_followed_by_no_traceback(tmp_path: Path) -> None:
    program = 'import sys; sys.stderr.write("[ERROR] the sentence\\n"); sys.exit(3)'
    done = torchrun(tmp_path, program)
    assert done.returncode == 3
    assert set(done.stderr.splitlines()) == {"[ERROR] the sentence"}


def test_a_process_that_can_say_nothing_any_more_is_spoken_for(tmp_path: Path) -> None:
    program = 'import os, time\nif os.environ["RANK"] == "1": os.kill(os.getpid(), 9)\ntime.sleep(60)'
    done = torchrun(tmp_path, program)
    assert done.returncode == 128 + 9
    (line,) = done.stderr.splitlines()
    assert line.startswith("[ERROR] rank 1 was ended by SIGKILL and could not say why: ")


@pytest.mark.parametrize(
    ("rank", "code", "sentence"),
    [
        ("1", 2, "[ERROR] nothing answers at MASTER_ADDR 127.0.0.1, MASTER_PORT "),
        ("0", 1, "[ERROR] the 2 nodes did not meet at 127.0.0.1:"),
    ],
)
def test_nodes_that_do_not_meet_are_told_in_one_sentence(
    tmp_path: Path, rank: str, code: int, sentence: str
) -> None:
    done = torchrun(tmp_path, "", "--nnodes", "2", "--node_rank", rank, MEET_TIMEOUT_S="2")
    assert done.returncode == code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)
    assert done.stdout.startswith("[INFO] waiting up to 2 s for node 0 at 127.0.0.1:") == (rank == "1")


def test_node_0_is_waited_for(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        wait_for_node_0("127.0.0.1", server.getsockname()[1], patience_s=5)
        port = server.getsockname()[1]
    began_s = time.monotonic()
    with pytest.raises(SettingsError, match=f"MASTER_PORT {port} .Connection refused., after 1 s"):
        wait_for_node_0("127.0.0.1", port, patience_s=0.6)
    assert time.monotonic() - began_s >= 0.6


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE 2, and ranks are 0 to WORLD_SIZE - 1"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1, and ranks are 0 to WORLD_SIZE - 1"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR not set and MASTER_PORT not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "no.such.invalid", "MASTER_PORT": "29500"}, "cannot find an"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "MEET_TIMEOUT_S": "1"},
            "nothing answers at MASTER_ADDR 127.0.0.1, MASTER_PORT 1 ",
        ),
    ],
)  # fmt: skip
def test_the_training_command_alone_waits_for_nobody_who_cannot_come(
    settings: dict[str, str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = pytest.importorskip("janusvln.train.command")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=sentence):
        command._launched_rank()

"""Output never raises: names that are no UTF-8, and Chinese ones in a log that is ASCII, cost no run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from small_data import SIZE, write_image

ROOT = Path(__file__).parent.parent
NAME = os.fsdecode("房间-".encode() + b"\xff\xfe")
"""Chinese, and no UTF-8."""
ENVIRONMENTS = {
    "UTF-8": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "utf-8:strict"},
    "ASCII": {"PYTHONIOENCODING": "ascii"},
}
ALL = """
import json, sys
from vggt_cache.cli import main
for command in json.loads(sys.argv[1]):
    code = main(command)
    print("exit code", code, flush=True)
"""


def run(environment: str, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))
    }
    kept |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", **ENVIRONMENTS[environment]}
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, env=kept)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    assert b"UnicodeEncodeError" not in done.stderr
    return done


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """An episode folder, below a folder of that name, with a damaged image and one whose name gives no step."""
    episode = tmp_path / NAME / "data" / NAME
    for step in range(3):
        write_image(episode / f"step_{step:04d}_{NAME}.png", seed=step)
    (episode / f"step_0003_{NAME}.png").write_bytes(b"damaged")
    (episode / f"step_{NAME}.png").write_bytes(b"")
    (episode / "milestones_result.json").write_text(json.dumps({"instruction_text": "走"}))
    return episode.parent


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_commands_over_names_that_cannot_be_shown_do_their_work(
    data: Path, small_checkpoint: Path, environment: str
) -> None:
    cache = data.parent / "cache"
    commands = [
        [
            "precompute",
            "--vggt_model_path",
            small_checkpoint,
            "--data_root",
            data,
            "--cache_dir",
            cache,
            *SIZE,
            "--verify",
        ],
        ["verify", cache, "--data_root", data],
        ["info", cache],
        ["view", cache, "--data_root", data, "-o", data.parent / "picture.png"],
        ["info", cache, "--json"],
    ]
    done = run(environment, "-c", ALL, json.dumps([[str(word) for word in command] for command in commands]))
    assert [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith(b"exit code")] == [
        3,
        1,
        0,
        0,
        0,
    ]
    assert b"[SUCCESS] Processed 3 images" in done.stdout
    assert b"Verification: 3/4 valid, 1 invalid" in done.stdout
    listed = [json.loads(line) for line in (cache / "failures.jsonl").read_text("ascii").splitlines()]
    assert any(os.fspath(data) in entry["path"] for entry in listed)
    info = done.stdout.split(b"exit code 0\n")[-2]
    assert json.loads(info)["cache_dir"] == os.fspath(cache)


TRAIN = ["janusvln.train", "--use_cpu", "--train_data_root", "d", "--output_dir", "o", "--model_name_or_path"]


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        *(
            (environment, command)
            for environment in ENVIRONMENTS
            for command in (["vggt_cache", "info"], ["vggt_cache"])
        ),
        ("ASCII", TRAIN),
    ],
)
def test_an_error_that_cannot_be_shown_is_still_one_sentence(
    tmp_path: Path, environment: str, command: list[str]
) -> None:
    done = run(environment, "-m", *command, tmp_path / NAME)
    assert done.returncode in (1, 2)
    assert done.stderr.count(b"[ERROR] ") == 1

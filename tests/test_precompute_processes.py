"""Real processes on one cache directory: started together, killed, interrupted, under a launcher."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from small_data import SIZE, plan_of, start, write_dataset
from trials.killed_runs import killed_runs
from vggt_cache import FeatureCache

FLAGS = [*SIZE, "--feature_dtype", "float32"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "precompute_vggt_features.py"


@pytest.fixture
def data(tmp_path):
    """Ten episodes of 20 steps: 200 images in 4 blocks, 200 lists in 7 to 10 blocks."""
    write_dataset(tmp_path / "data", episodes=10, steps=20)
    return tmp_path / "data"


@pytest.fixture
def arguments(data, small_checkpoint):
    def for_cache(cache_dir: Path, *flags: object) -> list[str]:
        fixed = [
            "precompute",
            "--vggt_model_path",
            small_checkpoint,
            "--data_root",
            data,
            "--cache_dir",
            cache_dir,
        ]
        return [str(part) for part in (*fixed, *FLAGS, *flags)]

    return for_cache


def records(cache_dir: Path) -> dict[bytes, torch.Tensor]:
    with FeatureCache.open(cache_dir) as cache:
        assert cache.damaged_shards == ()
        return {key: cache.get_by_key(key) for key in cache}


def stored_records(cache_dir: Path) -> int:
    """Records in all shards, superseded ones counted too."""
    from safetensors import safe_open

    total = 0
    for shard in cache_dir.glob("*/shards/*.safetensors"):
        with safe_open(shard, "pt") as opened:
            total += len(opened.keys())
    return total


def assert_same(ours: dict[bytes, torch.Tensor], single: dict[bytes, torch.Tensor]) -> None:
    assert ours.keys() == single.keys()
    for key, feature in ours.items():
        torch.testing.assert_close(feature, single[key], atol=1e-5, rtol=1e-5)


def processed(out: str) -> int:
    match = re.search(r"\[SUCCESS\](?: \[rank \d+\])? Processed (\d+) ", out)
    assert match, out
    return int(match[1])


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == expected, out + err
    return out


def wait_for_shards(cache_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    while len(list(cache_dir.glob("*/shards/*.safetensors"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture
def single(arguments, tmp_path):
    """What one process makes of the data."""

    def run(context: str) -> dict[bytes, torch.Tensor]:
        finish(start(arguments(tmp_path / f"single-{context}", "--context", context)))
        return records(tmp_path / f"single-{context}")

    return run


@pytest.mark.parametrize("context", [pytest.param("frame", marks=pytest.mark.slow), "causal"])
def test_two_processes_compute_each_feature_once(arguments, tmp_path, single, context):
    cache_dir = tmp_path / "cache"
    both = [start(arguments(cache_dir, "--context", context)) for _ in range(2)]
    counts = [processed(finish(process)) for process in both]
    assert sum(counts) == 200
    assert stored_records(cache_dir) == 200
    assert_same(records(cache_dir), single(context))


@pytest.mark.parametrize("context", ["frame", pytest.param("causal", marks=pytest.mark.slow)])
def test_a_killed_process_is_taken_over_and_the_result_is_the_same(arguments, tmp_path, single, context):
    cache_dir = tmp_path / "cache"
    flags = arguments(cache_dir, "--context", context)
    victim, other = start(flags, VGGT_CACHE_SHARD_BYTES="1"), start(flags, VGGT_CACHE_SHARD_BYTES="1")
    wait_for_shards(cache_dir, 4, victim)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    again = start(flags)
    finish(other)
    finish(again)
    assert_same(records(cache_dir), single(context))
    assert (
        list(cache_dir.glob("*/claims/*.alive")) == [] or len(list(cache_dir.glob("*/claims/*.alive"))) == 1
    )


def test_workers_do_not_outlive_a_killed_parent(arguments, tmp_path):
    cache_dir = tmp_path / "cache"
    process = start(arguments(cache_dir, "--num_workers", 2), VGGT_CACHE_SHARD_BYTES="1")
    wait_for_shards(cache_dir, 1, process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) >= 2
    process.kill()
    process.wait()
    try:
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "a worker is still there"
            time.sleep(0.05)
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(worker), signal.SIGKILL)
        process.communicate()


def test_the_guides_two_process_example_as_it_stands(arguments, tmp_path):
    cache_dir = tmp_path / "cache"
    one = start(arguments(cache_dir, "--max_samples", 100))
    two = start(arguments(cache_dir, "--max_samples", -1, "--skip_existing"))
    assert processed(finish(one)) + processed(finish(two)) == 200
    assert stored_records(cache_dir) == 200


@pytest.mark.parametrize(
    ("number", "name"),
    [pytest.param(signal.SIGINT, "SIGINT", marks=pytest.mark.slow), (signal.SIGTERM, "SIGTERM")],
)
def test_a_signal_commits_what_is_finished_and_says_how_to_go_on(arguments, tmp_path, number, name):
    cache_dir = tmp_path / "cache"
    process = start(arguments(cache_dir, "--num_workers", 2), VGGT_CACHE_SHARD_BYTES="1")
    wait_for_shards(cache_dir, 2, process)
    process.send_signal(number)
    out = finish(process, expected=128 + number)
    match = re.search(
        rf"\[WARN\] Stopped by {name}: (\d+) images of this run are committed in .*; run the same", out
    )
    assert match
    assert int(match[1]) == len(records(cache_dir)) > 0
    assert list(cache_dir.glob("*/claims/*")) == []
    assert list(cache_dir.glob("*/shards/.tmp*")) == []
    rest = start(arguments(cache_dir))
    assert processed(finish(rest)) == 200 - int(match[1])


def test_control_c_in_a_terminal_reaches_the_workers_too_and_is_quiet(arguments, tmp_path):
    cache_dir = tmp_path / "cache"
    process = start(arguments(cache_dir, "--num_workers", 2), new_group=True, VGGT_CACHE_SHARD_BYTES="1")
    wait_for_shards(cache_dir, 1, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Stopped by SIGINT" in out
    assert "Traceback" not in out + err
    assert "KeyboardInterrupt" not in out + err


def test_under_torchrun_the_ranks_share_the_work(arguments, tmp_path):
    cache_dir = tmp_path / "cache"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), *arguments(cache_dir)[1:]],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"\[SUCCESS\](?: \[rank \d\])? Processed (\d+) images", done.stdout)
    assert len(counts) == 2
    assert sum(map(int, counts)) == 200
    assert done.stdout.count("[INFO] Scanning data root") == 1


def test_the_script_runs_from_a_checkout_without_installation(tmp_path, data):
    """`-S` hides the environment's own path configuration; third-party packages are named by hand."""
    import torch as installed

    packages = str(Path(installed.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-S", "scripts/precompute_vggt_features.py", "--help"],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent.parent,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": packages},
    )
    assert done.returncode == 0, done.stderr
    assert "--vggt_model_path" in done.stdout


@pytest.mark.slow
def test_a_claim_torn_by_a_crash_expires(arguments, data, tmp_path):
    """Created, and killed before its owner's name was written."""
    cache_dir = tmp_path / "cache"
    finish(start(arguments(cache_dir, "--max_samples", 1)))
    (claims,) = cache_dir.glob("*/claims")
    block = plan_of(data, "frame").blocks[1]
    (claims / f"{block.block_id}.0").touch()
    assert processed(finish(start(arguments(cache_dir), VGGT_CACHE_CLAIM_TTL_S="3"))) == 199
    assert list(claims.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(10))
def test_killed_runs_leave_nothing_torn_and_are_taken_up_to_the_same_bits(tmp_path, seed):
    """A hundred runs in all, each killed at a random moment."""
    assert killed_runs(seed, tmp_path) == 10

"""Precompute by a Ray cluster of this machine: the keys and bits of a plain run, whoever is killed on the way."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from small_data import SIZE, start, write_dataset
from vggt_cache import FeatureCache

pytestmark = pytest.mark.slow
ONE_BY_ONE = {"VGGT_CACHE_SHARD_BYTES": "1"}
"""A shard for each feature: whatever is killed has committed something."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten episodes of 20 steps: 200 lists in ten blocks."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, episodes=10, steps=20)
    return folder


@pytest.fixture(scope="module")
def arguments(data: Path, small_checkpoint: Path) -> Callable[..., list[object]]:
    def for_cache(cache_dir: Path | str, *flags: object) -> list[object]:
        named = ["--vggt_model_path", small_checkpoint, "--data_root", data, "--cache_dir", cache_dir]
        return ["precompute", *named, *SIZE, "--context", "causal", "--feature_dtype", "float32", *flags]

    return for_cache


@pytest.fixture
def by_ray(
    arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.Popen[str]]:
    """Starts a run of two actors."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def started(*flags: object, **environment: str) -> subprocess.Popen[str]:
        with_ray = arguments(tmp_path / "cache", "--engine", "ray", "--ray_actors", 2, *flags)
        return start(with_ray, **{**ONE_BY_ONE, **environment})

    return started


@pytest.fixture(scope="module")
def undisturbed(arguments, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, bytes]:
    """What a plain run stores."""
    cache_dir = tmp_path_factory.mktemp("plain") / "cache"
    finish(start(arguments(cache_dir)))
    return records(cache_dir)


def records(cache_dir: Path | str) -> dict[bytes, bytes]:
    with FeatureCache.open(cache_dir) as cache:
        assert cache.damaged_shards == ()
        return {key: cache.get_by_key(key).numpy().tobytes() for key in cache}


def finish(process: subprocess.Popen[str], expected: int = 0) -> str:
    out, err = process.communicate(timeout=280)
    assert process.returncode == expected, out + err
    assert "Traceback" not in out + err
    return out


def wait_for_shards(cache_dir: Path, count: int, process: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + 200
    while len(list(cache_dir.glob("*/shards/*.safetensors"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until_s
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def below(pid: int) -> list[int]:
    """All processes that this one has started, and those that they have."""
    return [one for child in children(pid) for one in (child, *below(child))]


def named(pids: list[int], name: str) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def actors(pid: int) -> list[int]:
    return named(below(pid), "EncodingProcess")


# ---------------------------------------------------------------- a Ray of the run's own


def test_a_run_by_actors_is_that_of_one_process(by_ray, undisturbed, tmp_path: Path) -> None:
    out = finish(by_ray("--verify", "--recompute", 3, "--num_workers", 1))
    assert "[SUCCESS] Processed 200 features" in out
    assert "[INFO] Verification: 200/200 valid, 0 invalid" in out
    assert "[INFO] Recomputed 3 features" in out
    assert records(tmp_path / "cache") == undisturbed


def test_a_killed_actor_is_replaced_and_the_result_is_the_same(by_ray, undisturbed, tmp_path: Path) -> None:
    process = by_ray()
    wait_for_shards(tmp_path / "cache", 5, process)
    os.kill(actors(process.pid)[0], signal.SIGKILL)
    out = finish(process)
    assert "[WARN] a process of the cluster is lost" in out
    assert records(tmp_path / "cache") == undisturbed


def test_a_killed_driver_takes_all_along_and_the_same_command_goes_on(
    by_ray, undisturbed, tmp_path: Path
) -> None:
    process = by_ray()
    wait_for_shards(tmp_path / "cache", 5, process)
    started = below(process.pid)
    process.kill()
    process.communicate()
    until_s = time.monotonic() + 60
    while named(started, "EncodingProcess"):
        assert time.monotonic() < until_s, "an actor is still there"
        time.sleep(0.1)
    before = len(records(tmp_path / "cache"))
    assert 5 <= before < 200
    out = finish(by_ray())
    counts = re.search(r"\[SUCCESS\] Processed (\d+) ", out)
    assert counts
    assert int(counts[1]) == 200 - before
    assert records(tmp_path / "cache") == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_commits_what_is_finished_and_says_how_to_go_on(by_ray, tmp_path: Path, number) -> None:
    process = by_ray()
    wait_for_shards(tmp_path / "cache", 3, process)
    process.send_signal(number)
    out = finish(process, expected=128 + number)
    match = re.search(r"\[WARN\] Stopped by \w+: (\d+) features of this run are committed", out)
    assert match
    assert int(match[1]) == len(records(tmp_path / "cache")) > 0
    assert list((tmp_path / "cache").glob("*/shards/.tmp*")) == []


def test_control_c_in_a_terminal_reaches_all_processes_and_is_quiet(arguments, tmp_path: Path) -> None:
    with_ray = arguments(tmp_path / "cache", "--engine", "ray", "--ray_actors", 2, "--num_workers", 1)
    process = start(with_ray, new_group=True, **ONE_BY_ONE)
    wait_for_shards(tmp_path / "cache", 3, process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "Stopped by SIGINT" in out
    assert "Traceback" not in out + err
    assert "KeyboardInterrupt" not in out + err


def test_a_driver_that_stands_still_now_and_then_changes_nothing(by_ray, undisturbed, tmp_path: Path) -> None:
    process = by_ray()
    wait_for_shards(tmp_path / "cache", 3, process)
    for _ in range(4):
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.5)
    finish(process)
    assert records(tmp_path / "cache") == undisturbed


def test_an_address_where_nobody_answers_is_a_sentence(arguments, tmp_path: Path) -> None:
    process = start(arguments(tmp_path / "cache", "--engine", "ray", "--ray_address", "127.0.0.1:9"))
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2
    assert "[ERROR] no Ray answers at 127.0.0.1:9" in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- a cluster


@pytest.fixture
def cluster() -> Iterator[object]:
    """A head, and a second node, of one core each, with the smallest object store that Ray allows."""
    utils = pytest.importorskip("ray.cluster_utils")
    node = {"num_cpus": 1, "object_store_memory": 76 * 2**20}
    made = utils.Cluster(initialize_head=True, head_node_args=node)
    made.second = made.add_node(**node)
    made.wait_for_nodes()
    yield made
    made.shutdown()


def test_a_node_that_is_lost_costs_what_it_had_not_committed(
    by_ray, undisturbed, cluster, tmp_path: Path
) -> None:
    process = by_ray(RAY_ADDRESS=cluster.address)
    wait_for_shards(tmp_path / "cache", 5, process)
    cluster.remove_node(cluster.second, allow_graceful=False)
    out = finish(process)
    assert "[WARN] a process of the cluster is lost" in out
    assert records(tmp_path / "cache") == undisturbed


def test_large_data_does_not_pass_through_a_tiny_object_store(
    by_ray, undisturbed, cluster, tmp_path: Path
) -> None:
    finish(by_ray("--ray_address", cluster.address, "--recompute", 3))
    assert records(tmp_path / "cache") == undisturbed


def test_actors_fill_a_bucket(arguments, bucket: str, undisturbed) -> None:
    finish(start(arguments(bucket, "--engine", "ray", "--ray_actors", 2), **ONE_BY_ONE))
    assert records(bucket) == undisturbed

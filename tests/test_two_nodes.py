"""Two nodes: network namespaces with a cable between them, one process in each, started as the guide says.

Needs root and `ip` (iproute2); where they are missing the tests are skipped with the reason.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from launch_kit import SCRIPTS
from store_kit import make_spec, write_shard
from train_data_kit import talk, tiny_qwen, write_frames, write_records
from vggt_cache.cluster.network import free_port
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.store import ShardWriter, create_store

ADDRESSES = ("10.231.77.1", "10.231.77.2")
SPEC = make_spec(image_size=56)
GRID = (3, 4)
"""Of a 64x48 image at 56 pixels."""


class Nodes:
    """Two network namespaces, joined by a pair of virtual interfaces that have different names."""

    def __init__(self) -> None:
        tag = uuid4().hex[:6]
        self.names = [f"vln-{tag}-{rank}" for rank in range(2)]
        self.interfaces = [f"vln{tag}{side}" for side in "ab"]

    def build(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
        here, there = self.interfaces
        _ip(
            "link",
            "add",
            here,
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            there,
            "netns",
            self.names[1],
        )
        for name, interface, address in zip(self.names, self.interfaces, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", interface)
            for link in (interface, "lo"):
                _ip("-n", name, "link", "set", link, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    @contextmanager
    def run(
        self, script: str, folder: Path, settings: list[dict[str, str]]
    ) -> Iterator[list[subprocess.Popen[str]]]:
        """The script on both nodes at once, each with its own settings; what still runs at the end is killed."""
        started = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, "bash", str(SCRIPTS / script)], cwd=folder, text=True,
                env=environment(NODE_RANK=str(rank), MASTER_ADDR=ADDRESSES[0], NNODES="2", **settings[rank]),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for rank, name in enumerate(self.names)
        ]  # fmt: skip
        try:
            yield started
        finally:
            for pid in self._processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in started:
                process.communicate()

    def _processes(self) -> list[int]:
        listings = [
            subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False).stdout
            for name in self.names
        ]
        return [int(pid) for listing in listings for pid in listing.split()]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    if shutil.which("ip") is None:
        pytest.skip("`ip` (iproute2) is not installed, so no network namespaces can be made")
    made = Nodes()
    try:
        made.build()
    except subprocess.CalledProcessError as error:
        made.remove()
        pytest.skip(
            f"this system allows no network namespaces: {' '.join(error.cmd)}: {error.stderr.strip()}"
        )
    yield made
    made.remove()


def environment(**settings: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **settings}


def outputs(processes: list[subprocess.Popen[str]], timeout_s: float = 240) -> list[str]:
    return [process.communicate(timeout=timeout_s)[0] for process in processes]


# ---------------------------------------------------------------- check_cluster.sh


def check(nodes: Nodes, folder: Path, *cache_dirs: str, **settings: str) -> tuple[list[int], list[str]]:
    """Exit codes and what each node printed."""
    common = {"MASTER_PORT": str(free_port()), "TIMEOUT_S": "60", **settings}
    each = [{**common, "VGGT_CACHE_DIR": cache_dir} for cache_dir in cache_dirs]
    with nodes.run("check_cluster.sh", folder, each) as started:
        said = outputs(started)
    return [process.returncode for process in started], said


def test_two_nodes_that_see_one_cache_agree(nodes: Nodes, tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    codes, said = check(nodes, tmp_path, "cache", "cache")
    assert codes == [0, 0], said
    tables = [text.partition("\n")[2] for text in said]
    assert tables[0] == tables[1]
    assert ", ".join(ADDRESSES) in tables[0]


def test_a_node_that_sees_another_snapshot_is_told_so_on_both(nodes: Nodes, tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    write_shard(tmp_path / "cache", [2])
    codes, said = check(nodes, tmp_path, "cache", "copy")
    assert codes == [1, 1], said
    for text in said:
        assert [line.split()[1:3] for line in text.splitlines() if line.startswith("fail")] == [
            ["cache", "snapshot"]
        ]
        assert "2 features; node 1: " in text


# ---------------------------------------------------------------- training


def write_training_data(root: Path, samples: int = 12) -> Path:
    """Conversations over small images, and a cache beside them that covers all; returns the data root."""
    data = root / "data"
    data.mkdir()
    names = write_frames(data, samples)
    records = []
    for last in range(samples):
        images = names[max(0, last - 2) : last + 1]
        records.append(
            {"images": images, "conversations": talk("<image>" * len(images) + " Where to?", f"STEP {last}")}
        )
    write_records(data, records)
    with ShardWriter(create_store(root / "cache", SPEC), SPEC) as writer:
        for number, name in enumerate(names):
            feature = torch.randn(
                (*GRID, SPEC.encoder.channels), generator=torch.Generator().manual_seed(number)
            )
            writer.append(
                feature_key(SPEC, [frame_digest((data / name).read_bytes())]), feature.to(torch.bfloat16)
            )
        writer.commit()
    return data


def training_settings(output: str) -> dict[str, str]:
    return {
        "DEVICE": "cpu", "MODEL_PATH": str(tiny_qwen()), "DATA_ROOT": "data", "VGGT_CACHE_DIR": "cache",
        "VGGT_MODEL_PATH": "/not/here", "VGGT_CACHE_MISS": "error", "OUTPUT_DIR": output, "MAX_STEPS": "4",
        "LEARNING_RATE": "1e-3", "GRAD_ACCUM_STEPS": "1", "LOGGING_STEPS": "1", "NUM_WORKERS": "0", "MIN_PIXELS": "784",
        "REPORT_TO": "none", "SAVE_STEPS": "1000",
    }  # fmt: skip


def losses(output: Path) -> list[float]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def train_on_one_node(folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / "train_h800.sh")], cwd=folder, env=environment(**settings), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_nodes_have_the_losses_of_one_node_with_two_processes(nodes: Nodes, tmp_path: Path) -> None:
    write_training_data(tmp_path)
    settings = training_settings("two") | {"MASTER_PORT": str(free_port())}
    with nodes.run("train_2node_h800.sh", tmp_path, [settings, settings]) as started:
        said = outputs(started)
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    for text, interface in zip(said, nodes.interfaces, strict=True):
        assert f"NCCL_SOCKET_IFNAME={interface} GLOO_SOCKET_IFNAME={interface}" in text
    assert "VGGT feature cache enabled" in said[0]

    one = train_on_one_node(tmp_path, **training_settings("one"), NPROC_PER_NODE="2")
    assert one.returncode == 0, one.stdout
    expected = losses(tmp_path / "one")
    assert len(expected) == 4
    assert len(set(expected)) == 4
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-6)


def test_training_does_not_begin_where_a_node_sees_another_cache(nodes: Nodes, tmp_path: Path) -> None:
    write_training_data(tmp_path)
    shutil.copytree(tmp_path / "cache", tmp_path / "copy")
    write_shard(tmp_path / "cache", [1], SPEC)
    settings = training_settings("two") | {"MASTER_PORT": str(free_port()), "DS_CONFIG": "none"}
    with nodes.run(
        "train_2node_h800.sh", tmp_path, [settings, settings | {"VGGT_CACHE_DIR": "copy"}]
    ) as started:
        said = outputs(started)
    assert all(process.returncode != 0 for process in started)
    for text in said:
        assert "the nodes see different directories" in text.splitlines()[-1]
        assert text.splitlines()[-1].startswith("[ERROR]")
    assert not (tmp_path / "two" / "trainer_state.json").exists()

"""scripts/check_cluster.sh: where nodes disagree, do not come or cannot reach each other, all of them say so."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from launch_kit import Launch
from store_kit import make_spec, write_shard
from vggt_cache.cluster import check, network
from vggt_cache.cluster.check import NONE, NodeFacts, Places, check_cluster, judge, look_around
from vggt_cache.cluster.meeting import Meeting, MeetingError, unreachable
from vggt_cache.cluster.network import Rendezvous, interfaces
from vggt_cache.doctor.findings import Finding
from vggt_cache.errors import SettingsError

T = TypeVar("T")


def places(folder: Path, cache: str = "cache", output: str = "output", **changes: object) -> Places:
    given = {"cache_dir": str(folder / cache), "output_dir": str(folder / output)}
    given |= dict.fromkeys(("data_root", "annotation_path", "data_path"), "")
    return Places(**{**given, "count_samples": False, **changes})  # type: ignore[arg-type]


def on_each_node(act: Callable[[Rendezvous], T], count: int = 2) -> list[T]:
    """What `act` gives on nodes that are threads of this process."""
    port = network.free_port()
    nodes = [
        Rendezvous(nodes=count, node_rank=rank, master_addr="127.0.0.1", master_port=port)
        for rank in range(count)
    ]
    with ThreadPoolExecutor(count) as pool:
        return [future.result() for future in [pool.submit(act, node) for node in nodes]]


def tables(folders: list[Places]) -> list[dict[str, Finding]]:
    """Each node's findings by name. All must be equal."""
    found = on_each_node(
        lambda node: check_cluster(node, folders[node.node_rank], timeout_s=30), count=len(folders)
    )
    assert all(table == found[0] for table in found)
    return [{finding.name: finding for finding in table} for table in found]


def failed(table: dict[str, Finding]) -> set[str]:
    return {name for name, finding in table.items() if finding.status == "fail"}


# ---------------------------------------------------------------- agreement


def test_nodes_that_see_the_same_agree(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1, 2])
    table = tables([places(tmp_path)] * 3)[0]
    assert failed(table) == set()
    assert table["cache snapshot"].value.endswith("2 features")
    assert table["torch"].status == "ok"
    assert list((tmp_path / "output").iterdir()) == []  # the marker is gone


def test_a_node_that_sees_another_snapshot_is_told_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    write_shard(tmp_path / "other", [2])  # as many, and not the same
    table = tables([places(tmp_path), places(tmp_path, "other")])[1]
    assert failed(table) == {"cache snapshot"}
    assert table["cache snapshot"].value.count("1 features") == 2
    assert "see different shards" in table["cache snapshot"].meaning


def test_a_node_that_sees_another_specification_is_told_so(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    write_shard(tmp_path / "other", [1], make_spec(context="causal"))
    table = tables([places(tmp_path), places(tmp_path, "other")])[1]
    assert failed(table) == {"cache fingerprint"}


@pytest.mark.parametrize(
    ("cache_dir", "said"),
    [("", "VGGT_CACHE_DIR is not set"), ("/not/here", "there is no directory /not/here")],
)
def test_a_node_without_the_cache_is_named(cache_dir: str, said: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    table = tables([places(tmp_path), places(tmp_path, cache_dir=cache_dir)])[0]
    assert table["cache"].status == "fail"
    assert table["cache"].value == "none on node 1"
    assert said in table["cache"].meaning


def test_an_output_directory_of_its_own_is_told(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    table = tables([places(tmp_path), places(tmp_path, output="local")])[0]
    assert failed(table) == {"output directory"}
    assert table["output directory"].value == "not shared with node 1"


def test_other_annotations_are_told_and_samples_are_counted_on_request(tmp_path: Path) -> None:
    for name, lines in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text('{"images": ["1.png"]}\n' * lines)
    write_shard(tmp_path / "cache", [1])
    here, there = (
        places(tmp_path, data_root=str(tmp_path / name), count_samples=True) for name in ("a", "b")
    )
    table = tables([here, there])[0]
    assert failed(table) == {"training data"}
    assert "node 0: 2 samples" in table["training data"].value
    assert "node 1: 3 samples" in table["training data"].value


def test_annotation_files_that_are_named_one_by_one_are_compared_too(tmp_path: Path) -> None:
    for name, lines in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "训练.jsonl").write_text('{"images": ["1.png"]}\n' * lines)
    write_shard(tmp_path / "cache", [1])
    here, there = (
        places(tmp_path, annotation_path=str(tmp_path / name / "训练.jsonl"), count_samples=True)
        for name in ("a", "b")
    )
    table = tables([here, there])[0]
    assert failed(table) == {"training data"}
    assert "node 1: 3 samples" in table["training data"].value


def test_no_training_data_is_not_taken_for_agreement(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    table = tables([places(tmp_path), places(tmp_path)])[0]
    assert (table["training data"].status, table["training data"].value) == ("warn", NONE)


# ---------------------------------------------------------------- comparisons

FACTS = NodeFacts(
    host="a", address="10.0.0.1", nodes="2", versions={"torch": "2.13.0", "nccl": "2.27.3"}, gpus="8 x H800",
    caches={}, cache_error=NONE, data=NONE,
)  # fmt: skip


def compare(
    other: NodeFacts = FACTS, clocks_s: tuple[float, float] = (0.0, 0.0), broken: tuple[int, ...] = ()
) -> dict[str, Finding]:
    here, there = clocks_s
    facts = [
        dataclasses.replace(FACTS, clock_s=here),
        dataclasses.replace(other, clock_s=there, unreachable=list(broken)),
    ]
    return {finding.name: finding for finding in judge(facts)}


def test_what_differs_is_told_with_the_value_of_each_node() -> None:
    assert failed(compare()) == set()
    older = dataclasses.replace(FACTS, versions={"torch": "2.5.0"})
    table = compare(older)
    assert failed(table) == {"torch", "nccl"}
    assert table["torch"].value == "node 0: 2.13.0; node 1: 2.5.0"
    assert failed(compare(dataclasses.replace(FACTS, nodes="3"))) == {"nodes"}


def test_unequal_gpus_are_a_warning() -> None:
    assert compare(dataclasses.replace(FACTS, gpus="4 x H800"))["GPUs"].status == "warn"


def test_clocks_may_differ_by_less_than_a_minute() -> None:
    assert compare(clocks_s=(1000.0, 1059.0))["clocks"].status == "ok"
    assert compare(clocks_s=(1061.0, 1000.0))["clocks"].status == "fail"


def test_a_connection_that_is_refused_is_told_with_its_direction() -> None:
    table = compare(broken=(0,))
    assert failed(table) == {"connections"}
    assert table["connections"].value == "none from node 1 to node 0"


def test_connections_are_really_tried() -> None:
    with socket.create_server(("", 0)) as listener:
        doors = [("127.0.0.1", listener.getsockname()[1]), ("127.0.0.1", network.free_port())]
        assert unreachable(doors, timeout_s=30) == [1]


def test_what_each_node_could_not_reach_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "unreachable", lambda addresses, timeout_s: [len(addresses) - 1])
    table = tables([places(tmp_path, cache_dir="")] * 2)[0]
    assert table["connections"].value == "none from node 0 to node 1, node 1 to node 1"


def test_a_node_says_what_it_has(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    facts = look_around(places(tmp_path), address="10.0.0.1", nodes=2)
    assert set(facts.caches) == {make_spec().fingerprint}
    assert set(facts.versions) >= {"python", "torch", "transformers", "deepspeed", "vggt-feature-cache"}


# ---------------------------------------------------------------- nodes that do not come


def alone(rank: int, port: int, timeout_s: float = 1.0) -> str:
    """What a node says that waits for the other in vain."""
    node = Rendezvous(nodes=2, node_rank=rank, master_addr="127.0.0.1", master_port=port)
    with pytest.raises(MeetingError) as caught, Meeting(node, timeout_s=timeout_s) as meeting:
        meeting.exchange("facts", {})
    return str(caught.value)


def test_who_does_not_come_is_named() -> None:
    port = network.free_port()
    assert alone(0, port).startswith("node 1 did not answer within 1 s: run check_cluster.sh there too")
    said = alone(1, port)
    assert said.startswith(f"node 0 did not answer at 127.0.0.1:{port} within 1 s")


def test_two_nodes_of_one_rank_are_told() -> None:
    def meet(node: Rendezvous) -> str:
        same = dataclasses.replace(node, nodes=3, node_rank=min(node.node_rank, 1))
        try:
            with Meeting(same, timeout_s=2) as meeting:
                meeting.exchange("facts", {})
        except MeetingError as error:
            return str(error)
        return ""

    said = on_each_node(meet, count=3)
    assert sum(text.startswith("two nodes say that they are NODE_RANK 1") for text in said) == 1
    assert said[0].startswith("node 2 did not answer")


def test_the_same_port_serves_again_at_once(tmp_path: Path) -> None:
    port = network.free_port()

    def meet(rank: int) -> list[int]:
        node = Rendezvous(nodes=2, node_rank=rank, master_addr="127.0.0.1", master_port=port)
        with Meeting(node, timeout_s=20) as meeting:
            return meeting.exchange("rank", rank)

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(meet, range(2))) == [[0, 1], [0, 1]]
        assert network.can_bind("", port)


# ---------------------------------------------------------------- network


def test_the_interface_is_the_one_that_has_the_address_or_leads_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert network.interface_towards("127.0.0.1") == "lo"
    assert network.can_bind("127.0.0.1", 0)
    assert not network.can_bind("192.0.2.1", 0)
    # A second address of an interface: by the kernel's table, the longest match.
    table = [
        "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT",
        "eth0 00000000 0100000A 0003 0 0 0 00000000 0 0 0",
        "ib0 00010A0A 00000000 0001 0 0 0 00FFFFFF 0 0 0",
        "eth1 00000A0A 00000000 0001 0 0 0 0000FFFF 0 0 0",
    ]
    monkeypatch.setattr(network, "_lines", lambda path: table if path == "/proc/net/route" else [])
    monkeypatch.setattr(network, "addresses_of", lambda name: [])
    monkeypatch.setattr(network, "local_address_towards", lambda address: address)
    assert network.interface_towards("10.10.1.7") == "ib0"
    assert network.interface_towards("10.10.2.7") == "eth1"
    assert network.interface_towards("8.8.8.8") == "eth0"


def test_interfaces_are_chosen_as_nccl_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "interface_names", lambda: ["lo", "eth0", "eth01", "ib0"])
    assert network.chosen_interfaces("eth") == ["eth0", "eth01"]
    assert network.chosen_interfaces("=eth0") == ["eth0"]
    assert network.chosen_interfaces("^lo,eth") == ["ib0"]
    assert network.chosen_interfaces("^=eth0") == ["lo", "eth01", "ib0"]
    assert network.chosen_interfaces("bond0,ib") == ["ib0"]


def test_a_given_interface_is_kept_and_the_other_found() -> None:
    assert interfaces("127.0.0.1", "", "") == {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    assert interfaces("127.0.0.1", "^eth9", "")["NCCL_SOCKET_IFNAME"] == "^eth9"
    with pytest.raises(SettingsError, match=r"NCCL_SOCKET_IFNAME is 'eth9', and this machine has .*lo"):
        interfaces("127.0.0.1", "eth9", "lo")


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"NODE_RANK": ""}, "NODE_RANK is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"TIMEOUT_S": "soon"}, "TIMEOUT_S is 'soon'"),
        ({"MASTER_ADDR": "127.0.0.1"}, "an address that no other node can reach"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, str], sentence: str, tmp_path: Path) -> None:
    node = {"MASTER_ADDR": "192.0.2.1", "NODE_RANK": "0", "NNODES": "2"}
    launch = Launch(tmp_path, script="check_cluster.sh", **{**node, **settings})
    assert launch.finish() == 2
    assert sentence in launch.err
    assert launch.err.count("\n") == 1


def test_one_node_alone_checks_itself_by_the_settings_of_the_training_script(tmp_path: Path) -> None:
    write_shard(tmp_path / "cache", [1])
    one = {
        "MASTER_ADDR": "127.0.0.1",
        "NODE_RANK": "0",
        "NNODES": "1",
        "MASTER_PORT": str(network.free_port()),
    }
    launch = Launch(tmp_path, script="check_cluster.sh", **one, VGGT_CACHE_DIR="cache")
    assert launch.finish() == 0, launch.err
    assert "cache snapshot" in launch.out
    missing = Launch(tmp_path, script="check_cluster.sh", **one, VGGT_CACHE_DIR="nothing")
    assert missing.finish() == 1
    assert "fail  cache" in missing.out

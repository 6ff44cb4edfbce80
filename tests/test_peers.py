"""The benchmark of peers: our own entry and those that need no other package keep the contract, and what is measured
of them tells good from bad."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
HERE = ["ours.Ours", "safetensors_files.SafetensorsFiles", "safetensors_files.SafetensorsShards"]


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "peers"]:
        del sys.modules[name]


def make_layout() -> Any:
    from peers.base import Layout

    return Layout(shape=(3, 4, 64), count=10, per_commit=4)


def kind_of(home: str) -> Any:
    from importlib import import_module

    module, _, name = home.partition(".")
    return getattr(import_module(f"peers.{module}"), name)


@pytest.mark.parametrize("home", HERE)
def test_a_peer_gives_back_what_it_was_given_and_reports_all_of_it_once(home: str, tmp_path: Path) -> None:
    from peers.base import is_feature
    from peers.storage import is_mapped

    layout, reported = make_layout(), []
    peer = kind_of(home)(tmp_path / "kept", layout)
    peer.write(reported.extend)
    peer.open()
    found = [peer.read(number) for number in range(layout.count)]
    out = torch.zeros(layout.shape, dtype=torch.bfloat16)
    peer.read_into(7, out)
    assert all(is_feature(one, number, layout.shape) for number, one in enumerate(found))
    assert not any(is_mapped(one) for one in found)
    assert is_feature(out, 7, layout.shape)
    assert sorted(reported) == list(range(layout.count))
    peer.close()


@pytest.mark.parametrize("home", HERE)
def test_a_peer_delivers_every_feature_once_in_each_epoch(home: str, tmp_path: Path) -> None:
    from peers.speed import check_batches, take_all

    layout = make_layout()
    peer = kind_of(home)(tmp_path / "kept", layout)
    peer.write(lambda numbers: None)
    loader = peer.batches(4, 2)
    check_batches(layout, loader)
    take_all(layout, loader)


def test_a_view_of_a_mapped_file_is_not_taken_for_a_feature_of_its_own(tmp_path: Path) -> None:
    from safetensors import safe_open

    from peers.storage import is_mapped

    layout = make_layout()
    kind_of("safetensors_files.SafetensorsFiles")(tmp_path / "kept", layout).write(lambda numbers: None)
    with safe_open(tmp_path / "kept" / "0.safetensors", "pt") as file:
        view = file.get_tensor("feature")
        assert is_mapped(view)
        assert not is_mapped(view.clone())


@pytest.mark.parametrize(("home", "answer"), [("ours.Ours", "noticed"), (HERE[1], "silent")])
def test_a_flipped_bit_is_noticed_where_there_is_a_checksum_and_served_where_there_is_none(
    home: str, answer: str, tmp_path: Path
) -> None:
    from peers.flipped import measure_flips

    layout = dataclasses.replace(make_layout(), count=8)
    counts = measure_flips(kind_of(home), tmp_path, layout, flips=5)
    assert counts["in_payload"] == counts[answer] == 5


def test_no_feature_that_our_store_reported_is_lost_to_a_kill(tmp_path: Path) -> None:
    from peers.killed import measure_kills

    counts = measure_kills(kind_of("ours.Ours"), tmp_path, make_layout(), trials=2, timeout_s=60.0)
    assert counts["verdict"] == "yes"
    assert counts["reported_features"] > 0


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        ({"reported": 4, "lost": 0, "wrong": 0}, "yes"),
        ({"reported": 4, "lost": 1, "wrong": 0}, "no"),
        ({"reported": 0, "lost": 0, "wrong": 1}, "no"),
        ({"reported": 0, "lost": 0, "wrong": 0}, "nothing"),
    ],
)
def test_a_verdict_says_whether_reports_were_kept_and_nothing_else_served(
    outcome: dict[str, int], verdict: str
) -> None:
    from peers.killed import verdict as verdict_of

    assert verdict_of([outcome]) == verdict
    if verdict == "no":
        assert verdict_of([outcome, {"reported": 4, "lost": 0, "wrong": 0}]) == "partly"


def test_a_child_that_dies_hangs_or_raises_is_an_error_in_one_sentence() -> None:
    from peers.processes import ChildError, in_child

    with pytest.raises(ChildError, match="the process died: exit status 3"):
        in_child("fork", 60.0, os._exit, 3)
    with pytest.raises(ChildError, match="no result after 0 s"):
        in_child("fork", 0.1, time.sleep, 60)
    with pytest.raises(ChildError, match="ValueError: invalid literal"):
        in_child("fork", 60.0, int, "x")


def test_a_child_that_hangs_is_gone_afterwards_with_its_own_children(tmp_path: Path) -> None:
    from peers.processes import ChildError, in_child

    with pytest.raises(ChildError):
        in_child("fork", 2.0, hang_with_a_child, tmp_path / "processes")
    processes = [int(text) for text in (tmp_path / "processes").read_text().split()]
    assert len(processes) == 2
    deadline_s = time.monotonic() + 20
    while any(map(runs, processes)) and time.monotonic() < deadline_s:
        time.sleep(0.05)  # a kill takes effect a little later
    assert not any(map(runs, processes))


def runs(process: int) -> bool:
    """Whether it does; one that was killed and that nobody has asked after has no command line any more."""
    try:
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    except OSError:
        return False


def hang_with_a_child(path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    path.write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)


def test_a_peer_that_cannot_be_imported_is_a_row_that_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers import row

    monkeypatch.setitem(sys.modules, "lmdb", None)  # as if it were not installed
    assert "lmdb" in row.measure_row("LMDB", tmp_path, row.SMALL)["missing"]


def a_result() -> dict[str, Any]:
    measured = {
        "version": "1.0",
        "speed": {
            "disk_over_raw": 1.001,
            "bytes_per_s": {"read": 2e9, "delivery": 3e9, "write": 1e9},
            "over_limit": {"read": 0.5, "delivery": 0.75, "write": 0.9},
        },
        "opening": {"open_s": 0.0012, "private_bytes": 2_500_000},
        "killed": {"verdict": "yes", "interrupted": 10, "failed": 0},
        "flipped": {"flips": 20, "noticed": 19},
    }
    return {
        "date": "2026-01-01",
        "machine": {"cores": 2, "cpu": "a processor"},
        "configuration": {"features": 192, "entries": 100_000, "batch_size": 8, "workers": 2},
        "figures": {
            "record_bytes": 6_594_560,
            "limits_bytes_per_s": {"preadv_1": 4e9, "preadv_threads": 4e9, "raw_write": 1.1e9},
            "peers": {
                "whole": measured,
                "broken": {**measured, "opening": "no result | after 5 s."},
                "absent": {"missing": "ModuleNotFoundError: no"},
            },
        },
    }


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_shows_figures_failures_and_absences(language: str) -> None:
    from peers.table import lines

    caption, _, head, rule, whole, broken, absent, _, reason = lines(a_result(), language)
    assert {line.count("|") for line in (head, rule, whole, broken, absent)} == {10}
    assert "2.00 (0.50) | - | 3.00 (0.75) | 1.00 (0.90)" in whole
    assert "1.2 ms" in whole
    assert "6.6 MB" in caption
    assert "ModuleNotFoundError: no" in absent
    assert "no result / after 5 s" in reason

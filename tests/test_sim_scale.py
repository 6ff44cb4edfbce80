"""The simulation of many processes runs the code that claims, to the end."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("storage", ["local", "nfs"])
@pytest.mark.parametrize("ranks", [True, False])
def test_simulated_processes_compute_everything_once_and_seldom_wait(monkeypatch, storage, ranks):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sim_scale

    work = sim_scale.Work(lists=3000, tree=1, per_block=64, encode_s=0.1, spread=0.1, shard_lists=42)
    row = sim_scale.simulate(work, 4, sim_scale.STORAGES[storage], ranks=ranks)
    assert row["twice"] == 0
    assert row["efficiency"] > 0.9


@pytest.mark.parametrize("storage", ["local", "nfs"])
def test_one_driver_keeps_simulated_actors_at_work(monkeypatch, storage):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sim_scale

    work = sim_scale.Work(lists=20_000, tree=1, per_block=64, encode_s=0.1, spread=0.1, shard_lists=42)
    row = sim_scale.simulate_driven(work, 16, sim_scale.STORAGES[storage])
    assert row["efficiency"] > 0.95

"""Ranks that stop together, and that train from one snapshot: real processes under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from janusvln.train.ranks import Ranks, agree_on_snapshot
from store_kit import make_spec, shard_path, write_shard
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache

ROOT = Path(__file__).resolve().parent.parent


def torchrun(tmp_path: Path, processes: int, body: str) -> subprocess.CompletedProcess[str]:
    """Run `body` on every rank, after `ranks` has been made."""
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, threading, time, torch, torch.distributed as dist\n"
        "from janusvln.train.ranks import Ranks\n"
        "dist.init_process_group('gloo')\n"
        "ranks = Ranks.of_this_run()\n" + body
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=environment, timeout=120, check=False
    )


def errors(run: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("[ERROR]")]


@pytest.mark.promise("Never a hang")
def test_ranks_that_wait_in_a_collective_stop_with_the_same_sentence(tmp_path: Path) -> None:
    run = torchrun(
        tmp_path, 3,
        "if ranks.rank == 1:\n"
        "    time.sleep(1)\n"
        "    sys.exit(ranks.stop_all('the feature of a.png is gone', 2))\n"
        "dist.all_reduce(torch.ones(1))\n"
        "print('went on')\n",
    )  # fmt: skip
    assert run.returncode != 0
    assert "went on" not in run.stdout
    said = sorted(errors(run))
    assert said == [
        "[ERROR] [rank 1] the feature of a.png is gone",
        "[ERROR] [rank 2] the feature of a.png is gone",
        "[ERROR] the feature of a.png is gone",
    ]
    assert "exitcode  : 2" in run.stderr  # the code that was given


def test_of_several_that_stop_at_once_all_say_the_first(tmp_path: Path) -> None:
    run = torchrun(
        tmp_path, 3, "sys.exit(ranks.stop_all(f'sentence of {ranks.rank}', 2))\n"
    )  # fmt: skip
    assert len(errors(run)) == 3
    assert len({line[line.index("sentence") :] for line in errors(run)}) == 1


def test_a_rank_that_stops_while_it_is_told_to_says_it_once(tmp_path: Path) -> None:
    run = torchrun(
        tmp_path, 2,
        "if ranks.rank == 1:\n"
        "    heard, say = threading.Event(), ranks._print\n"
        "    ranks._print = lambda *words: (heard.set(), time.sleep(0.5), say(*words))\n"
        "    heard.wait()\n"
        "sys.exit(ranks.stop_all(f'sentence of {ranks.rank}', 2))\n",
    )  # fmt: skip
    assert sorted(errors(run)) == ["[ERROR] [rank 1] sentence of 0", "[ERROR] sentence of 0"]


def test_what_ranks_exchange_comes_by_rank(tmp_path: Path) -> None:
    run = torchrun(
        tmp_path, 3,
        "time.sleep(0.2 * ranks.rank)\n"
        "print('found', ranks.exchange('name', f'text {ranks.rank}'), flush=True)\n"
        "dist.barrier()\n",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("found ['text 0', 'text 1', 'text 2']") == 3


# ---------------------------------------------------------------- one snapshot


class _Beside(Ranks):
    """A rank beside rank 0, which says this."""

    def __init__(self, leader: dict[str, object]) -> None:
        super().__init__(None, 1, 2)
        self._leader = json.dumps(leader)

    def exchange(self, name: str, text: str) -> list[str]:
        return [self._leader if name == "cache" else "", text]


def leader(cache: FeatureCache, **changes: object) -> dict[str, object]:
    told = {"host": "node0", "fingerprint": cache.spec.fingerprint, "names": cache.shard_names()}
    return told | changes


@pytest.mark.promise("one snapshot")
def test_a_rank_that_sees_more_takes_rank_0s_snapshot(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    early = FeatureCache.open(tmp_path)
    told = leader(early)
    write_shard(tmp_path, [2])
    late = FeatureCache.open(tmp_path)
    agreed = agree_on_snapshot(late, _Beside(told))
    assert agreed.snapshot == early.snapshot != late.snapshot


def test_a_rank_that_does_not_see_a_shard_says_so(tmp_path: Path) -> None:
    name = write_shard(tmp_path, [1])
    told = leader(FeatureCache.open(tmp_path))
    write_shard(tmp_path, [2])
    os.remove(shard_path(tmp_path, name))
    with pytest.raises(CacheAccessError, match="1 of the 1 that rank 0 on node0 sees are not among them"):
        agree_on_snapshot(FeatureCache.open(tmp_path), _Beside(told))


def test_a_rank_with_another_specification_says_so(tmp_path: Path) -> None:
    write_shard(tmp_path, [1])
    cache = FeatureCache.open(tmp_path)
    other = make_spec(context="causal").fingerprint
    with pytest.raises(CacheAccessError, match="the nodes see different directories"):
        agree_on_snapshot(cache, _Beside(leader(cache, fingerprint=other)))


@pytest.mark.parametrize("exit_code", [pytest.param(0, marks=pytest.mark.slow), 2, 143])
def test_a_process_leaves_without_taking_the_interpreter_down(exit_code: int) -> None:
    """What is freed in a half torn down interpreter, on a thread of gloo's, aborts a run that had finished.

    And torchrun's SIGTERM, where another rank has ended sooner, neither ends this one sooner nor as something else.
    """
    program = (
        "import atexit, os, signal\n"
        "from janusvln.train.command import leave\n"
        "class Tensor:\n"
        "    def __del__(self, say=print):\n"
        "        say('freed')\n"
        "held = Tensor()\n"
        "atexit.register(print, 'handled')\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "print('written', end=' ')\n"
        f"leave({exit_code})\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert run.returncode == exit_code
    assert run.stdout.split() == ["written", *(["handled"] if exit_code in (0, 143) else [])]

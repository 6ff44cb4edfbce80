"""Claims: one holder at a time, the dead are succeeded, and nothing depends on clocks of machines."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from vggt_cache.precompute.claims import Claims

BLOCK = "0" * 32
OTHER = "1" * 32


def _claim_and_hang(directory: str, connection) -> None:
    claims = Claims(Path(directory))
    connection.send(claims.try_claim(BLOCK))
    time.sleep(60)


def _race(directory: str, barrier, results) -> None:
    with Claims(Path(directory)) as claims:
        barrier.wait()
        results.put([block for block in (f"{n:032x}" for n in range(40)) if claims.try_claim(block)])
        barrier.wait()


@pytest.fixture
def hanging_holder(tmp_path):
    """A process that holds BLOCK and does not end by itself."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_claim_and_hang, args=(str(tmp_path), theirs))
    process.start()
    assert ours.recv()
    yield process
    process.kill()
    process.join()
    process.close()
    ours.close()
    theirs.close()


def test_a_block_has_one_holder(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.try_claim(BLOCK)
        assert not two.try_claim(BLOCK)
        assert two.try_claim(OTHER)
        assert two.held_by_others() == 1


def test_a_released_block_is_free(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.try_claim(BLOCK)
        one.release(BLOCK)
        assert two.try_claim(BLOCK)


def test_processes_that_start_together_never_share_a_block(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(3), context.Queue()
    racers = [context.Process(target=_race, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for racer in racers:
        racer.start()
    claimed = [block for _ in racers for block in results.get(timeout=60)]
    for racer in racers:
        racer.join()
        racer.close()
    assert len(claimed) == len(set(claimed)) == 40


def test_a_living_holder_keeps_its_block(tmp_path, hanging_holder):
    with Claims(tmp_path) as claims:
        assert not claims.try_claim(BLOCK)


def test_a_killed_holder_of_this_machine_is_succeeded_at_once(tmp_path, hanging_holder):
    os.kill(hanging_holder.pid, signal.SIGKILL)
    hanging_holder.join()
    with Claims(tmp_path) as claims:
        assert claims.try_claim(BLOCK)


def test_a_silent_holder_of_another_machine_expires(tmp_path, monkeypatch):
    with Claims(tmp_path, ttl_s=5.0) as silent, Claims(tmp_path, ttl_s=5.0) as claims:
        monkeypatch.setattr("vggt_cache.precompute.claims._is_known_dead", lambda process: False)
        assert silent.try_claim(BLOCK)
        assert not claims.try_claim(BLOCK)
        long_ago = time.time() - 60
        silent._stopped.set()
        silent._heart.join()
        os.utime(silent._alive, (long_ago, long_ago))
        assert claims.try_claim(BLOCK)


def test_only_one_of_two_successors_wins(tmp_path, hanging_holder):
    os.kill(hanging_holder.pid, signal.SIGKILL)
    hanging_holder.join()
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert [one.try_claim(BLOCK), two.try_claim(BLOCK)] == [True, False]


def test_two_that_see_a_free_block_at_once_cannot_both_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Claims, "_highest_generation", lambda self, block_id: None)
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert [one.try_claim(BLOCK), two.try_claim(BLOCK)] == [True, False]


def test_leaving_gives_everything_back(tmp_path):
    with Claims(tmp_path) as claims:
        claims.try_claim(BLOCK)
        claims.try_claim(OTHER)
    assert list(tmp_path.iterdir()) == []


def test_a_swept_folder_does_not_stop_the_work(tmp_path):
    with Claims(tmp_path) as claims, Claims(tmp_path) as other:
        assert claims.try_claim(BLOCK)
        for path in tmp_path.iterdir():
            path.unlink()
        assert other.try_claim(BLOCK), "a lost claim costs double work, nothing else"
        claims.release(BLOCK)

"""Claims: one holder at a time, the dead are succeeded, no clock matters, no fault ends in a traceback."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from vggt_cache.errors import CacheAccessError, SettingsError
from vggt_cache.precompute import claims as claims_module
from vggt_cache.precompute.claims import PATIENCE, Claims

BLOCK = "0" * 32
OTHER = "1" * 32
TTL_S = 60.0


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


class Clock:
    """Seconds of one process, which pass when the test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


class Watch:
    """An owner of claims and a process on another machine that watches it, each with a clock of its own."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(claims_module, "_has_ended", lambda process: False)
        self.directory = directory
        self.owners_clock, self.watchers_clock = Clock(), Clock(5.0)
        self.owner = Claims(directory, ttl_s=TTL_S, clock_s=self.owners_clock)
        self.watcher = Claims(directory, ttl_s=TTL_S, clock_s=self.watchers_clock)
        assert self.owner.try_claim(BLOCK)
        assert not self.watcher.try_claim(BLOCK), "seen for the first time, it counts as alive"
        (self.mark,) = [path for path in directory.glob("*.alive") if self.owner.token in path.name]

    def passes(self, seconds: float) -> None:
        self.owners_clock.now_s += seconds
        self.watchers_clock.now_s += seconds

    def set_mark(self, seconds_from_now: float) -> None:
        """What the file system's clock makes of a touch where that clock is ahead, or behind."""
        at = time.time() + seconds_from_now
        os.utime(self.mark, (at, at))


@pytest.fixture
def watch(tmp_path, monkeypatch):
    found = Watch(tmp_path, monkeypatch)
    yield found
    found.owner.close()
    found.watcher.close()


def test_a_block_has_one_holder(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert one.try_claim(BLOCK)
        assert not two.try_claim(BLOCK)
        assert two.try_claim(OTHER)
        assert two.look([BLOCK]).holds(BLOCK)


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


# ---------------------------------------------------------------- life is a mark that moves


def test_a_silent_holder_of_another_machine_expires(watch):
    watch.passes(TTL_S - 1)
    assert not watch.watcher.try_claim(BLOCK)
    watch.passes(2)
    assert watch.watcher.try_claim(BLOCK)


@pytest.mark.parametrize("clock_is_off_s", [0, 3600, -3600, 1e9])
def test_a_holder_whose_mark_moves_lives_whatever_its_clock_says(watch, clock_is_off_s):
    for second in range(10):
        watch.passes(TTL_S - 1)
        watch.set_mark(clock_is_off_s + second)
        assert not watch.watcher.try_claim(BLOCK)
        assert watch.watcher.look([BLOCK]).holds(BLOCK)


@pytest.mark.parametrize("clock_is_off_s", [0, 3600, -3600, 1e9])
def test_a_holder_whose_mark_stands_is_succeeded_whatever_its_clock_says(watch, clock_is_off_s):
    watch.set_mark(clock_is_off_s)
    assert not watch.watcher.try_claim(BLOCK), "it has moved since the last look"
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)


def test_the_heart_beats_as_long_as_work_progresses(watch):
    for _ in range(3 * PATIENCE):
        watch.passes(TTL_S / 2)
        watch.owner.progressed()
        watch.owner.beat()
        assert not watch.watcher.try_claim(BLOCK)


def test_a_living_process_whose_decoders_hang_loses_its_claims(watch):
    for _ in range(PATIENCE):
        watch.owner.beat()
        assert not watch.watcher.try_claim(BLOCK)
        watch.passes(TTL_S)
    watch.owner.beat()
    assert watch.watcher.try_claim(BLOCK)


def test_a_slow_batch_is_no_hang(watch):
    watch.passes((PATIENCE - 1) * TTL_S)
    watch.set_mark(-1000)
    watch.owner.beat()
    assert watch.mark.stat().st_mtime > time.time() - 500


def test_a_mark_that_is_swept_away_counts_as_standing(watch):
    watch.mark.unlink()
    assert not watch.watcher.try_claim(BLOCK)
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)


def test_a_claim_without_a_name_in_it_is_waited_for_no_longer_than_others(tmp_path):
    clock = Clock()
    (tmp_path / f"{BLOCK}.0").write_bytes(b"")  # its maker was killed between creating and writing
    with Claims(tmp_path, ttl_s=TTL_S, clock_s=clock) as claims:
        assert not claims.try_claim(BLOCK)
        clock.now_s += TTL_S
        assert claims.try_claim(BLOCK)


# ---------------------------------------------------------------- processes of this machine


def test_a_living_process_that_proc_hides_is_alive(monkeypatch):
    """With hidepid=2, /proc shows no process of another user; the kernel still says that there is one."""
    process = claims_module._this_process()
    monkeypatch.setattr(claims_module, "_start_time", lambda pid: None)

    def of_another_user(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "kill", of_another_user)
    assert not claims_module._has_ended(process)


def test_a_process_that_is_gone_has_ended_and_one_of_the_same_number_is_another():
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=time.time)
    child.start()
    process = {**claims_module._this_process(), "pid": child.pid}
    assert claims_module._has_ended(process), (
        "this number belongs to another process, started at another time"
    )
    child.join()
    assert claims_module._has_ended({**process, "pid": child.pid})
    assert not claims_module._has_ended(claims_module._this_process())


@pytest.mark.parametrize("pid", [0, -1, 1 << 40, True, "1", None])
def test_what_is_no_process_number_is_asked_of_nobody(monkeypatch, pid):
    monkeypatch.setattr(os, "kill", lambda pid, number: pytest.fail("a signal was sent"))
    assert not claims_module._has_ended({**claims_module._this_process(), "pid": pid})


# ---------------------------------------------------------------- successors


def test_only_one_of_two_successors_wins(tmp_path, hanging_holder):
    os.kill(hanging_holder.pid, signal.SIGKILL)
    hanging_holder.join()
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        assert [one.try_claim(BLOCK), two.try_claim(BLOCK)] == [True, False]


def test_two_that_see_a_free_block_at_once_cannot_both_get_it(tmp_path):
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        seen = one.look()
        assert [one.try_claim(BLOCK, seen), two.try_claim(BLOCK, seen)] == [True, False]


def test_two_that_see_a_dead_holder_at_once_cannot_both_succeed_it(tmp_path, hanging_holder):
    os.kill(hanging_holder.pid, signal.SIGKILL)
    hanging_holder.join()
    with Claims(tmp_path) as one, Claims(tmp_path) as two:
        seen = one.look([BLOCK])
        assert not seen.holds(BLOCK)
        assert [one.try_claim(BLOCK, seen), two.try_claim(BLOCK, seen)] == [True, False]


def test_who_was_not_asked_after_counts_as_alive(tmp_path, hanging_holder):
    os.kill(hanging_holder.pid, signal.SIGKILL)
    hanging_holder.join()
    with Claims(tmp_path) as claims:
        assert claims.look().holds(BLOCK)
        assert not claims.look([BLOCK]).holds(BLOCK)


def test_giving_a_block_of_the_first_generation_back_lists_nothing(tmp_path, monkeypatch):
    """Only a successor has claims of the dead to sweep; listings are what costs where many take part."""
    with Claims(tmp_path) as claims:
        assert claims.try_claim(BLOCK)
        monkeypatch.setattr(claims._folder, "names", lambda: pytest.fail("the folder was listed"))
        claims.release(BLOCK)
        assert not (tmp_path / f"{BLOCK}.0").exists()


def test_one_that_was_succeeded_gives_back_nothing_of_its_successors(watch):
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)
    watch.owner.release(BLOCK)
    with Claims(watch.directory) as third:
        assert not third.try_claim(BLOCK)


def test_nor_of_who_claims_the_block_anew_after_the_successor_is_done(watch):
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)
    watch.watcher.release(BLOCK)
    with Claims(watch.directory) as third, Claims(watch.directory) as fourth:
        assert third.try_claim(BLOCK)  # under the very name that the owner's claim had
        watch.owner.release(BLOCK)
        assert not fourth.try_claim(BLOCK)


def test_leaving_gives_everything_back(tmp_path):
    with Claims(tmp_path) as claims:
        claims.try_claim(BLOCK)
        claims.try_claim(OTHER)
    assert list(tmp_path.iterdir()) == []


def test_a_successor_sweeps_the_claims_of_the_dead(watch):
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)
    watch.watcher.release(BLOCK)
    assert [path.suffix for path in watch.directory.iterdir()] == [".alive", ".alive"]


# ---------------------------------------------------------------- faults


def test_a_swept_folder_does_not_stop_the_work(tmp_path):
    with Claims(tmp_path) as claims, Claims(tmp_path) as other:
        assert claims.try_claim(BLOCK)
        for path in tmp_path.iterdir():
            path.unlink()
        assert other.try_claim(BLOCK), "a lost claim costs double work, nothing else"
        claims.release(BLOCK)
        assert list(tmp_path.glob(f"{BLOCK}.*")), "that is the other's claim by now"


def test_a_folder_that_vanishes_is_a_sentence_when_claiming_and_nothing_when_leaving(tmp_path):
    folder = tmp_path / "claims"
    claims = Claims(folder)
    assert claims.try_claim(BLOCK)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CacheAccessError, match=r"no work can be claimed.*claims does not exist"):
        claims.try_claim(OTHER)
    claims.beat()
    claims.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES, errno.EIO, errno.EDQUOT])
def test_where_no_claim_can_be_written_the_run_ends_in_one_sentence(tmp_path, monkeypatch, number):
    with Claims(tmp_path) as claims:
        assert claims.try_claim(BLOCK)

        def refuse(*arguments: object, **options: object) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", refuse)
            with pytest.raises(CacheAccessError, match=rf"{OTHER}.0 cannot be .*{os.strerror(number)}"):
                claims.try_claim(OTHER)
            with pytest.raises(CacheAccessError, match=os.strerror(number)):
                Claims(tmp_path)
        assert not list(tmp_path.glob(f"{OTHER}.*")), "nothing is left of a claim that failed"
        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", refuse)
            patch.setattr(os, "utime", refuse)
            claims.beat()
            claims.release(BLOCK)


def _link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_text("f" * 32)
    path.symlink_to(elsewhere)


THINGS = {
    "a link": _link,
    "a link to nothing": lambda path, elsewhere: path.symlink_to(elsewhere / "nowhere"),
    "a link to a device": lambda path, elsewhere: path.symlink_to("/dev/zero"),
    "a pipe": lambda path, elsewhere: os.mkfifo(path),
    "a folder": lambda path, elsewhere: path.mkdir(),
    "no UTF-8": lambda path, elsewhere: path.write_bytes(b"\xff" * 32),
    "endless": lambda path, elsewhere: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 1 << 40),
    "no claim": lambda path, elsewhere: path.write_text(json.dumps({"pid": 1})),
    "unreadable": lambda path, elsewhere: (path.write_text("f" * 32), path.chmod(0)),
}


@pytest.mark.parametrize("thing", THINGS)
def test_what_stands_in_a_claims_place_hangs_nobody_and_is_succeeded(tmp_path, thing):
    folder, clock = tmp_path / "claims", Clock()
    folder.mkdir()
    THINGS[thing](folder / f"{BLOCK}.0", tmp_path / "elsewhere")
    with Claims(folder, ttl_s=TTL_S, clock_s=clock) as claims:
        assert not claims.try_claim(BLOCK)
        assert claims.try_claim(OTHER)
        clock.now_s += TTL_S
        assert claims.try_claim(BLOCK)
        claims.release(BLOCK)


@pytest.mark.parametrize("thing", THINGS)
def test_what_stands_in_a_marks_place_hangs_nobody_and_is_succeeded(watch, tmp_path, thing):
    watch.mark.unlink()
    THINGS[thing](watch.mark, tmp_path / "elsewhere")
    watch.owner.beat()
    watch.watcher.try_claim(BLOCK)
    watch.passes(TTL_S)
    assert watch.watcher.try_claim(BLOCK)


def test_a_folder_of_claims_that_is_a_link_or_a_file_is_not_written_through(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(CacheAccessError, match=f"{name} is not what belongs there"):
            Claims(tmp_path / name)
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused_in_a_sentence(tmp_path, monkeypatch, text):
    monkeypatch.setenv("VGGT_CACHE_CLAIM_TTL_S", text)
    with pytest.raises(SettingsError, match=f"VGGT_CACHE_CLAIM_TTL_S is '{text}'"):
        Claims(tmp_path)


def test_claims_have_the_modes_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with Claims(tmp_path) as claims:
            claims.try_claim(BLOCK)
            assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}
    finally:
        os.umask(before)

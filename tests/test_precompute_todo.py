"""What is to do: who takes what next, when a process looks, and that a look that is old has nothing done twice."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from vggt_cache.precompute import claims as claims_module
from vggt_cache.precompute.claims import Claims
from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.todo import LOOK_EVERY_S, MOST_AHEAD, SHARE, Todo

TTL_S = 60.0


def blocks(count: int, features: int = 2) -> list[Block]:
    every = np.arange(count * features).reshape(count, features)
    return [Block(block_id=f"{number:032x}", features=own) for number, own in enumerate(every)]


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class View:
    """The features that a process knows to be stored, of those that really are."""

    def __init__(self, stored: set[int], clock: Clock) -> None:
        self._stored, self._clock = stored, clock
        self._known: set[int] = set()
        self.refreshes, self.takes_s = 0, 0.0
        self.asked_singly: list[int] = []

    def refresh(self) -> None:
        self.refreshes += 1
        self._clock.now_s += self.takes_s
        self._known = set(self._stored)

    def finished(self, features: np.ndarray) -> np.ndarray:
        return np.isin(features, list(self._known))

    def missing(self, features: Iterable[int]) -> list[int]:
        asked = list(features)
        self.asked_singly += asked
        return [feature for feature in asked if feature not in self._known]


class Crew:
    """Processes that share a folder and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.stored = folder, Clock(), set[int]()
        self.claims: list[Claims] = []
        self.told = 0

    def join(self, work: list[Block], place: float = 0.0) -> tuple[Todo, View]:
        claims = Claims(self.folder, ttl_s=TTL_S, clock_s=self.clock)
        self.claims.append(claims)
        view = View(self.stored, self.clock)
        return Todo(work, claims, view, place=place, on_finished=self._tell, clock_s=self.clock), view

    def commit(self, todo: Todo, block: Block, *, shows: bool = True) -> None:
        self.stored.update(block.features.tolist())
        todo.done(block.block_id, shows=shows)

    def _tell(self, features: int) -> None:
        self.told += features


@pytest.fixture
def crew(tmp_path):
    found = Crew(tmp_path)
    yield found
    for claims in found.claims:
        claims.close()
    assert list(tmp_path.iterdir()) == []


def take_all(todo: Todo) -> list[Block]:
    return list(iter(todo.take, None))


# ---------------------------------------------------------------- who takes what


def test_two_processes_share_a_few_blocks_however_quick_one_of_them_is(crew):
    work = blocks(4)
    (one, _), (two, _) = crew.join(work), crew.join(work)
    held: list[Block] = []
    one.look()
    while len(held) < one.ahead and (block := one.take()) is not None:
        held.append(block)
    assert len(held) <= 2
    assert two.take() is not None


def test_where_much_is_left_blocks_are_held_ahead(crew):
    todo, _ = crew.join(blocks(100))
    assert todo.ahead == MOST_AHEAD
    take_all(todo)
    assert todo.ahead == 1


def number_of(block: Block) -> int:
    return int(block.block_id, 16)


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_ranks_begin_far_from_each_other_and_go_on_without_meeting(crew, processes):
    work = blocks(50)
    ranks = [crew.join(work, rank / processes)[0] for rank in range(processes)]
    taken = [[number_of(todo.take()) for _ in range(50 // processes)] for todo in ranks]
    assert taken == [list(range(50 * at // processes, 50 * (at + 1) // processes)) for at in range(processes)]


def test_who_meets_another_goes_on_anywhere_else(crew):
    """And not through all that the other one has taken since the last look, a claim that fails for each."""
    work = blocks(2000)
    (one, _), (two, _) = crew.join(work, 0.0), crew.join(work, 0.0)
    for _ in range(1000):
        one.take()
    tried: list[str] = []
    real = crew.claims[1].try_claim
    crew.claims[1].try_claim = lambda *arguments: (tried.append(arguments[0]), real(*arguments))[1]
    assert two.take() is not None
    assert len(tried) < 40, "each other one is free with a chance of a half"


def test_large_blocks_come_first_and_neighbours_of_about_one_size_follow_each_other(crew):
    sizes = [3, 64, 70, 3, 2, 100, 2]
    begins = np.cumsum([0, *sizes])
    work = [
        Block(block_id=f"{at:032x}", features=np.arange(begins[at], begins[at + 1]))
        for at in range(len(sizes))
    ]
    taken = [len(block.features) for block in take_all(crew.join(work)[0])]
    assert taken[:3] == [64, 70, 100]
    assert sorted(taken[3:]) == [2, 2, 3, 3]


def test_a_process_without_a_rank_begins_by_chance(crew):
    firsts = {crew.join(blocks(500), place=None)[0].take().block_id for _ in range(4)}
    assert len(firsts) > 1


# ---------------------------------------------------------------- when it looks


def test_blocks_are_taken_without_a_look_at_the_store_for_each(crew):
    todo, view = crew.join(blocks(100))
    assert len(take_all(todo)) == 100
    assert view.refreshes == 1


def test_looks_come_every_few_seconds_or_take_a_small_share_of_the_time(crew):
    todo, view = crew.join(blocks(100))
    crew.clock.now_s += LOOK_EVERY_S - 1
    todo.take()
    assert view.refreshes == 1
    view.takes_s = 3.0
    crew.clock.now_s += 1
    todo.take()
    assert view.refreshes == 2
    crew.clock.now_s += 3.0 / SHARE - 1
    todo.take()
    assert view.refreshes == 2
    crew.clock.now_s += 1
    todo.take()
    assert view.refreshes == 3


def test_what_others_have_finished_is_dropped_in_bulk_and_told_of(crew):
    work = blocks(10)
    todo, view = crew.join(work)
    crew.stored.update(range(12), [19])
    crew.clock.now_s += LOOK_EVERY_S
    block = todo.take()
    assert block is not None
    assert (len(todo), crew.told - (number_of(block) == 9)) == (3, 12)
    assert len(view.asked_singly) == 2, "blocks of which nothing is missing are not looked at one by one"
    taken = {number_of(one): one.features.tolist() for one in (block, *take_all(todo))}
    assert taken == {6: [12, 13], 7: [14, 15], 8: [16, 17], 9: [18]}
    assert crew.told == 13


# ---------------------------------------------------------------- nothing is done twice because a look is old


def test_a_block_that_was_finished_since_the_last_look_is_not_computed_again(crew):
    work = blocks(1)
    (one, _), (two, _) = crew.join(work), crew.join(work)
    block = one.take()
    assert block is not None
    crew.commit(one, block)
    assert two.take() is None
    crew.clock.now_s += LOOK_EVERY_S
    assert two.take() is None
    assert len(two) == 0


def test_the_claim_of_a_finished_block_is_given_back_when_all_have_looked(crew, tmp_path):
    work = blocks(2)
    one, _ = crew.join(work)
    for block in take_all(one):
        crew.commit(one, block)
    crew.clock.now_s += one.kept_s
    assert len(list(tmp_path.glob("*.0"))) == 2
    one.wait()
    assert list(tmp_path.glob("*.0")) == []


def test_the_claims_of_slow_looks_stay_for_several_of_them(crew, tmp_path):
    todo, view = crew.join(blocks(2))
    view.takes_s = 2.0
    todo.look()
    first, second = take_all(todo)
    crew.commit(todo, first)
    crew.clock.now_s += 1.9 * 2.0 / SHARE
    crew.commit(todo, second)
    assert (tmp_path / f"{first.block_id}.0").exists()


def test_a_block_that_was_not_stored_whole_is_anybodys_at_once(crew):
    work = blocks(1)
    (one, _), (two, _) = crew.join(work), crew.join(work)
    block = one.take()
    assert block is not None
    crew.stored.add(0)
    one.done(block.block_id, shows=False)
    rest = two.take()
    assert rest is not None


def test_who_ends_takes_the_claims_along_and_others_look_before_they_compute(crew):
    work = blocks(3)
    (one, _), (two, view) = crew.join(work), crew.join(work)
    for block in (one.take(), one.take()):
        assert block is not None
        crew.commit(one, block)
    crew.claims[0].close()
    refreshes = view.refreshes
    assert [block.block_id for block in take_all(two)] == [work[2].block_id]
    assert view.refreshes == refreshes + 1
    assert crew.told == 4


def test_processes_that_see_nothing_of_each_others_features_do_not_wait_for_ever(crew):
    """As where the data is mounted in different places: each would wait for the claim that the other one keeps."""
    work = blocks(2)
    (one, _), (two, _) = crew.join(work), crew.join(work)
    mine, theirs = one.take(), two.take()
    assert mine is not None
    assert theirs is not None
    one.done(mine.block_id, shows=True)
    two.done(theirs.block_id, shows=True)
    assert one.wait()
    assert two.wait()
    crew.clock.now_s += one.kept_s
    assert one.wait()
    assert not two.wait()
    assert two.take().block_id == mine.block_id
    assert not one.wait()


# ---------------------------------------------------------------- the dead


def test_what_a_silent_process_held_is_taken_while_others_work_and_looked_at_first(crew, monkeypatch):
    monkeypatch.setattr(claims_module, "_has_ended", lambda process: False)
    work = blocks(2)
    (one, _), (two, view) = crew.join(work), crew.join(work)
    lost = one.take()
    assert two.take() is not None
    assert two.wait(), "its owner is seen for the first time"
    crew.clock.now_s += TTL_S
    crew.stored.add(0)
    assert not two.wait()
    block = two.take()
    assert block is not None
    assert lost is not None
    assert (block.block_id, block.features.tolist()) == (lost.block_id, [1])
    assert view.refreshes == 3
    one.done(lost.block_id, shows=False)

"""Any sequence of mishaps: what was acknowledged is there, and what is given is what was stored.

Each step runs several clients that a seed interleaves on a simulated disk (`trials/world.py`), or damages
something, and after each step everything is checked against an oracle outside of the store.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from simulated_client import Client, Faults
from simulated_disk import MODELS, Disk
from store_kit import make_key
from trials.checks import check
from trials.simulated import interleaved, power_loss
from trials.world import World
from vggt_cache.store import FeatureCache

SEEDS = st.integers(0, 2**32 - 1)


class StoreMachine(RuleBasedStateMachine):
    """Every rule ends in a check of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(
        seed=SEEDS, clients=st.text("wrp", min_size=1, max_size=4), late=st.booleans(), stingy=st.booleans()
    )
    def work(self, seed: int, clients: str, late: bool, stingy: bool) -> None:
        self.world.burst(seed, clients, Faults(late=late, stingy=stingy))
        check(self.world)

    @rule(seed=SEEDS, clients=st.text("wrp", min_size=1, max_size=3), rate=st.sampled_from([0.01, 0.05, 0.2]))
    def work_with_faults(self, seed: int, clients: str, rate: float) -> None:
        self.world.burst(seed, clients, Faults(rate=rate, stingy=True))
        check(self.world)

    @rule(seed=SEEDS, clients=st.text("wrp", max_size=2), kill_at=st.integers(1, 80))
    def kill_a_writer(self, seed: int, clients: str, kill_at: int) -> None:
        self.world.burst(seed, "w" + clients, Faults(kill_at=kill_at))
        check(self.world)

    @rule(
        seed=SEEDS, clients=st.text("wrp", max_size=2), at=st.integers(1, 120), model=st.sampled_from(MODELS)
    )
    def lose_power(self, seed: int, clients: str, at: int, model: str) -> None:
        self.world.burst(seed, "w" + clients, power_at=at)
        self.world.lose_power(seed, model)
        check(self.world)

    @rule(seed=SEEDS, how=st.sampled_from(["flip", "zero", "cut"]))
    def damage_a_shard(self, seed: int, how: str) -> None:
        self.world.damage_shard(seed, how)
        check(self.world)

    @rule(seed=SEEDS, how=st.sampled_from(["flip", "zero", "cut", "drop", "old"]))
    def damage_the_index(self, seed: int, how: str) -> None:
        self.world.damage_index(seed, how)
        check(self.world)

    @rule(seed=SEEDS)
    def move_the_directory(self, seed: int) -> None:
        self.world.move()
        check(self.world)


StoreMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=8,
    deadline=None,
    derandomize=True,  # `run_trials.py --trial stateful` is for new sequences
    phases=[Phase.generate],  # a seed does not shrink, and eight steps can be read as they are
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
TestAnySequenceOfMishaps = StoreMachine.TestCase


@pytest.mark.promise("committed survives")
@pytest.mark.parametrize("model", MODELS)
def test_a_power_loss_at_any_operation_loses_nothing_that_was_acknowledged(model: str) -> None:
    for seed in range(40):
        power_loss(seed, model)


def test_one_seed_is_one_run() -> None:
    for seed in range(3):
        first, second = interleaved(seed), interleaved(seed)
        assert first.disk.tick == second.disk.tick > 100
        assert contents(first.disk) == contents(second.disk)


def contents(disk: Disk) -> list[bytes]:
    return [bytes(node.data) for node in disk.nodes()]


def test_the_check_sees_a_lost_a_changed_and_a_foreign_record() -> None:
    def lose(world: World, name: str) -> None:
        folder = world.disk.find(world.oracle.shards_path)
        assert folder is not None
        del folder.names[name]

    def change(world: World, name: str) -> None:
        world.disk.alter(f"{world.oracle.shards_path}/{name}", world.oracle.contents(name)[:-1] + b"\0")

    def disown(world: World, name: str) -> None:
        world.oracle.attempted.clear()

    for spoil in (lose, change, disown):
        world = World(1)
        world.burst(1, "ww")
        check(world)
        spoil(world, world.oracle.names()[0])
        with pytest.raises(AssertionError):
            check(world)


def test_a_reader_on_another_machine_sees_a_new_shard_late_and_then_for_good() -> None:
    seen_late = 0
    for seed in range(20):
        world = World(seed)
        reader = Client(world.disk, seed, Faults(late=True))
        with FeatureCache.open("/cache", fs=reader) as cache:
            world.burst(seed, "w")
            number = next(iter(world.oracle.acknowledged.values())).pop()
            cache.refresh()
            seen_late += make_key(number) not in cache
            world.disk.pass_time()
            cache.refresh()
            assert make_key(number) in cache
    assert seen_late

"""Trials on a simulated disk. One seed is one run."""

from __future__ import annotations

from random import Random

from simulated_client import Faults
from simulated_disk import MODELS
from trials.checks import check
from trials.world import World

CLIENTS = ("w", "wr", "ww", "wwr", "wp", "wpr", "wwp", "pp", "wpp", "rp", "pwr", "rrp", "wwwrrr")
SHARD_DAMAGE = ("flip", "zero", "cut")
INDEX_DAMAGE = ("flip", "zero", "cut", "drop", "old")


def any_faults(random: Random) -> Faults:
    return Faults(
        rate=random.choice((0.0, 0.0, 0.02, 0.05, 0.2)),
        stingy=random.random() < 0.3,
        late=random.random() < 0.3,
        kill_at=random.choice((None, random.randint(1, 120))),
    )


def interleaved(seed: int) -> World:
    """Four rounds of several clients at once, with whatever may go wrong; everything is checked after each."""
    random = Random(seed)
    world = World(seed)
    calm, damage = random.random() < 0.2, random.random() < 0.4
    for _ in range(4):
        faults = Faults() if calm else any_faults(random)
        power_at = None if calm or random.random() < 0.6 else random.randint(1, 200)
        world.burst(random.getrandbits(32), random.choice(CLIENTS), faults, power_at)
        if power_at is not None:
            world.lose_power(random.getrandbits(32), random.choice(MODELS))
        if damage and random.random() < 0.5:
            world.damage_shard(random.getrandbits(32), random.choice(SHARD_DAMAGE))
            world.damage_index(random.getrandbits(32), random.choice(INDEX_DAMAGE))
        if random.random() < 0.1:
            world.move()
        check(world)
    return world


def power_loss(seed: int, model: str) -> World:
    """Two writers, perhaps a reader, and no power from some operation on; then the same again."""
    random = Random(seed)
    world = World(seed)
    for _ in range(2):
        world.burst(random.getrandbits(32), random.choice(("w", "ww", "wr")), power_at=random.randint(1, 90))
        world.lose_power(random.getrandbits(32), model)
        check(world)
    return world

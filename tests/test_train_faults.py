"""The cache breaks while two ranks train from it under ZeRO-3: never a hang, never a wrong feature."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from store_kit import shards_dir
from train_kit import Kit, largest_difference, logged
from train_processes_kit import ROOT, start, train
from vggt_cache.store import FeatureCache, ShardWriter, create_store

STEPS = 24
"""One and a half epochs: the second comes back to shards that are open."""
SAME = 1e-5
PATIENCE_S = 240


@pytest.fixture(scope="module")
def live(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(kit, tmp_path_factory.mktemp("live"), "--max_steps", STEPS, config=None, cached=False)


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 4096)


def flip(shard: Path) -> None:
    shard.chmod(0o644)
    with open(shard, "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-4096, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def remove(shard: Path) -> None:
    """As after its mount went: what is not open yet cannot be opened."""
    shard.unlink()


DAMAGES = [
    pytest.param(flip, id="flipped"),
    pytest.param(truncate, id="truncated", marks=pytest.mark.slow),
    pytest.param(remove, id="gone", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_cannot_be_read_is_computed_with_one_warning(
    kit: Kit, tmp_path: Path, live: list[dict[str, float]], damage: Callable[[Path], None]
) -> None:
    shards = one_record_shards(kit, tmp_path / "cache")
    log = tmp_path / "log"
    process = training(kit, tmp_path, "encode", log)
    damage_after_the_first_step(process, log, shards, damage)
    assert process.wait(timeout=PATIENCE_S) == 0, log.read_text(errors="replace")[-3000:]
    found = logged(tmp_path / "out")
    assert largest_difference(live, found) < SAME
    assert found[0]["cache_hit_rate"] == 1.0
    assert min(entry["cache_hit_rate"] for entry in found) == 0.0
    warnings = log.read_text(errors="replace").count("cannot be read from the cache and is computed instead")
    assert 1 <= warnings <= 2  # of each rank that met it


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_or_all_ranks_stop_with_one_sentence(
    kit: Kit, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    shards = one_record_shards(kit, tmp_path / "cache")
    log = tmp_path / "log"
    process = training(kit, tmp_path, "error", log)
    damage_after_the_first_step(process, log, shards, damage)
    assert process.wait(timeout=PATIENCE_S) != 0
    said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("[ERROR] ")]
    assert len(said) == 2, said
    assert len({line.removeprefix("[ERROR] ").removeprefix("[rank 1] ") for line in said}) == 1


# ---------------------------------------------------------------- steps


def one_record_shards(kit: Kit, cache_dir: Path) -> list[Path]:
    """The kit's features, each in a shard of its own: not all are open when the first step is done."""
    whole = FeatureCache.open(kit.cache, context="frame", root=kit.data)
    store = create_store(cache_dir, whole.spec)
    for key in whole:
        feature = whole.get_by_key(key)
        assert feature is not None
        with ShardWriter(store, whole.spec) as writer:
            writer.append(key, feature)
            writer.commit()
    return sorted(shards_dir(cache_dir, whole.spec).iterdir())


def training(kit: Kit, folder: Path, miss: str, log: Path) -> subprocess.Popen[bytes]:
    flags = kit.flags(
        folder / "out", "--vggt_cache_dir", folder / "cache", "--vggt_cache_miss", miss, "--vggt_model_path",
        kit.vggt, "--max_steps", STEPS, "--per_device_train_batch_size", 1, "--deepspeed",
        ROOT / "scripts" / "zero3.json",
    )  # fmt: skip
    return start(flags, log=log)


def damage_after_the_first_step(
    process: subprocess.Popen[bytes], log: Path, shards: list[Path], damage: Callable[[Path], None]
) -> None:
    while "'cache_hit_rate'" not in log.read_text(errors="replace"):
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        time.sleep(0.005)
    for shard in shards:
        damage(shard)

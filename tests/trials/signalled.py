"""Trials with runs and writers that are asked to end, once or twice, and with those that run out of memory."""

from __future__ import annotations

import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from store_kit import SPEC, equal, make_key
from test_store_processes import FEATURES, read_all, write_for_ever
from trials.children import Child, exhaust_memory
from trials.small_runs import Scene, Spare, small_checkpoint, temporary_shards
from trials.toy_encoder import ToyCheckpoint
from vggt_cache.store import FeatureCache, create_store

TRIALS_PER_SEED = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM)
REAL_ENCODER_EVERY = 4
WRONG = 7
"""Exit status of a reader that was given another feature than it asked for."""


def signals(seed: int, folder: Path, *, trials: int = TRIALS_PER_SEED, checkpoint: Any = None) -> int:
    """Runs, and writers of the store alone, that get one signal or two; some of them are short of memory instead."""
    random = Random(seed)
    if checkpoint is None:
        real = seed % REAL_ENCODER_EVERY == 0
        checkpoint = small_checkpoint() if real else ToyCheckpoint(pause_s=0.004)
    scene = Scene.make(folder, random, checkpoint)
    create_store(folder / "written", SPEC)
    for number in range(trials):
        kind = random.choice(
            (_signal_run, _signal_run, _signal_run, _signal_writer, _starve_run, _starve_store)
        )
        kind(scene, folder / f"cache-{number}", random)
    return trials


# ---------------------------------------------------------------- runs


def _signal_run(scene: Scene, cache_dir: Path, random: Random) -> None:
    sent: list[int] = []
    while not sent:  # a run that was at its end already is begun anew
        shutil.rmtree(cache_dir, ignore_errors=True)
        with scene.start(cache_dir, shard_records=random.choice((1, 1, 2))) as child:
            scene.wait_at_random(child, cache_dir, random)
            sent = _send(child, random) if child.runs() else []
            end = child.end()
    found = scene.check(cache_dir)
    assert end.status in {0, *(128 + number for number in sent), *(-number for number in sent)}, end
    assert end.status or found == set(scene.expected), "a run that ended well is incomplete"
    if len(sent) == 1:
        assert temporary_shards(cache_dir) == [], "a run that was asked to end left a temporary file"
    told = re.search(r"Stopped by \w+: (\d+) (?:image|feature)s? of this run are committed", end.said)
    assert told is None or int(told[1]) == len(found), f"{len(found)} features are there: {end.said}"
    scene.complete(cache_dir)


def _send(child: Child, random: Random) -> list[int]:
    """One signal, or a second one a moment after it; returns those that were sent."""
    sent = [random.choice(SIGNALS)]
    child.send(sent[0])
    if random.random() < 0.5 and child.wait(10 ** random.uniform(-4.0, -1.5)):
        sent.append(random.choice(SIGNALS))
        child.send(sent[1])
    return sent


def _starve_run(scene: Scene, cache_dir: Path, random: Random) -> None:
    """It may fail in any way that is an end; what it has stored is right, and a run with enough memory goes on."""
    spare = Spare(feature=random.randrange(len(scene.expected)), memory_bytes=_some_memory(random))
    with scene.start(cache_dir, spare=spare) as child:
        status = child.end().status
    found = scene.check(cache_dir)
    assert status or found == set(scene.expected), "a run that ended well is incomplete"
    (cache_dir / "failures.jsonl").unlink(missing_ok=True)  # images that there was no memory for
    scene.complete(cache_dir)


def _some_memory(random: Random) -> int:
    return int(2 ** random.uniform(8, 23))


# ---------------------------------------------------------------- the store alone


def _signal_writer(scene: Scene, cache_dir: Path, random: Random) -> None:
    """A writer that handles no signal itself: it ends by KeyboardInterrupt, or at once."""
    store = scene.folder / "written"
    reading, writing = os.pipe()
    log = scene.folder / f"{cache_dir.name}.log"
    with Child(partial(write_for_ever, store, random.getrandbits(32), writing), log) as child:
        os.close(writing)
        child.wait(random.uniform(0.0, 0.03))
        sent = _send(child, random)
        while child.wait(5.0):  # the interpreter drops a KeyboardInterrupt that comes inside of a finaliser
            sent.append(signal.SIGTERM)
            child.send(signal.SIGTERM)
        end = child.end()
    assert end.status in {*(128 + number for number in sent), *(-number for number in sent)}, end
    _check_store(store, set(read_all(reading)))
    os.close(reading)


def _starve_store(scene: Scene, cache_dir: Path, random: Random) -> None:
    """A writer, then a reader, with little memory: an error, or right answers."""
    store, memory_bytes = scene.folder / "written", _some_memory(random)
    reading, writing = os.pipe()
    log = scene.folder / f"{cache_dir.name}.log"
    body = partial(_write_starving, store, random.getrandbits(32), writing, memory_bytes)
    with Child(body, log) as child:
        os.close(writing)
        child.wait(0.03)
        child.send(signal.SIGKILL)
        child.end()
    _check_store(store, set(read_all(reading)))
    os.close(reading)
    with Child(partial(_read_starving, store, memory_bytes), log) as child:
        assert child.end().status != WRONG


def _write_starving(store: Path, seed: int, acknowledge: int, memory_bytes: int) -> None:
    exhaust_memory(memory_bytes)
    write_for_ever(store, seed, acknowledge)


def _read_starving(store: Path, memory_bytes: int) -> int:
    exhaust_memory(memory_bytes)
    with FeatureCache.open(store) as cache:
        return 0 if all(_is_right(cache, number) for number in range(len(FEATURES))) else WRONG


def _is_right(cache: FeatureCache, number: int) -> bool:
    feature = cache.get_by_key(make_key(number))
    return feature is None or equal(feature, FEATURES[number])


def _check_store(store: Path, acknowledged: set[int]) -> None:
    with FeatureCache.open(store, use_index=False) as cache:
        assert cache.damaged_shards == ()
        lost = [number for number in acknowledged if make_key(number) not in cache]
        assert not lost, f"{lost} were acknowledged and are lost"
        assert all(_is_right(cache, number) for number in range(len(FEATURES)))

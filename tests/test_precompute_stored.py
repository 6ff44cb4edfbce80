"""What is known of features in bulk is what is known of each: their keys, and whether they are stored."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from small_data import SIZE, plan_of, write_dataset
from store_kit import make_feature, make_spec
from trials.replaced_images import SETTLE_S
from trials.toy_encoder import ToyCheckpoint, toy_encoder
from vggt_cache.cli import main
from vggt_cache.precompute.digests import DigestTable, state_hash
from vggt_cache.precompute.known_keys import KnownKeys
from vggt_cache.precompute.stored import Stored
from vggt_cache.small_files import file_state
from vggt_cache.store import FeatureCache, ShardWriter, create_store
from vggt_cache.store.record import key_array


class Place:
    """Data, and a cache of it, which another process fills."""

    def __init__(self, folder: Path, context: str) -> None:
        write_dataset(folder / "data")
        self.plan, self.spec = plan_of(folder / "data", context), make_spec(context=context)
        self.cache_dir = folder / "cache"
        self.store_dir = create_store(self.cache_dir, self.spec)
        self.others = DigestTable(str(self.cache_dir))
        self.known = self._known()

    def _known(self) -> KnownKeys:
        return KnownKeys(self.plan, self.spec, DigestTable(str(self.cache_dir)))

    def note(self, *frames: int, of: int = 0) -> None:
        """Another process has read these frames."""
        paths = [self.plan.frames.paths[frame] for frame in frames]
        states = [file_state(path) for path in paths]
        self.others.append(
            (state_hash(path, state), bytes([frame, of] * 16))
            for frame, path, state in zip(frames, paths, states, strict=True)
            if state
        )

    def commit(self, *features: int) -> None:
        """Another process, which knows all digests, has stored these features."""
        known = self._known()
        with ShardWriter(self.store_dir, self.spec) as writer:
            for feature in features:
                key = known.key(feature)
                assert key is not None
                writer.append(key, make_feature(feature, self.spec))
            writer.commit()

    def keys(self) -> dict[int, bytes]:
        return {f: key for f in range(len(self.plan)) if (key := self.known.key(f)) is not None}


@pytest.fixture(params=["frame", "causal"])
def place(tmp_path, request):
    return Place(tmp_path, request.param)


def test_new_keys_are_those_that_have_come_or_changed_and_each_is_told_once(place):
    seen: dict[int, bytes] = {}

    def told() -> set[int]:
        place.known.reload()
        features, keys = place.known.new_keys()
        found = dict(zip(features.tolist(), keys, strict=True))
        for feature, key in found.items():
            assert (key == key_array([place.known.key(feature)])[0]).all()
            seen[feature] = place.known.key(feature)
        assert seen == place.keys(), "none is left out"
        return set(found)

    assert told() == set()
    place.note(0, 1, 2)
    assert told() == {0, 1, 2}
    assert told() == set()
    place.note(1, 4)
    place.note(1, of=7)
    changed = {f for f in range(3) if 1 in place.plan.frames_of(f)}
    assert told() == changed | ({4} if len(place.plan.frames_of(4)) == 1 else set())
    place.known.learn(3, b"3" * 32)
    place.known.learn(0, bytes([0, 0] * 16))
    assert 3 in told()
    place.known.learn(0, b"0" * 32)
    assert 0 in told()


@pytest.mark.parametrize("recompute", [False, True])
def test_features_found_in_bulk_are_those_that_are_found_one_by_one(place, recompute):
    every = np.arange(len(place.plan))
    place.note(*range(9))
    place.commit(0, 1, 2)
    with FeatureCache.open(place.cache_dir, spec=place.spec) as cache:
        stored = Stored(place.known, cache, recompute=recompute)

        def same() -> list[int]:
            left = stored.missing(every.tolist())
            assert stored.all_missing() == left
            assert every[~stored.finished(every)].tolist() == left
            return left

        place.known.reload()
        assert (0 in same()) == recompute
        place.commit(4, 5)
        assert 4 in same(), "a snapshot stays as it is"
        stored.refresh()
        assert {4, 5}.isdisjoint(same())
        if recompute:
            place.commit(0)
            stored.refresh()
            assert 0 not in same()


def test_a_feature_whose_frame_became_another_one_is_not_finished(place):
    place.note(*range(12))
    place.commit(*range(12))
    with FeatureCache.open(place.cache_dir, spec=place.spec) as cache:
        stored = Stored(place.known, cache, recompute=False)
        stored.refresh()
        assert stored.all_missing() == []
        place.note(5, of=1)
        stored.refresh()
        expected = [f for f in range(12) if 5 in place.plan.frames_of(f)]
        assert stored.all_missing() == expected


def test_others_find_what_was_put_here_and_is_on_the_disk_and_nothing_else(place):
    place.note(0, 1, 2)
    place.commit(0)
    with FeatureCache.open(place.cache_dir, spec=place.spec) as cache:
        place.known.reload()
        stored = Stored(place.known, cache, recompute=False)
        stored.own.add(place.known.key(1))
        assert [stored.shows_others(feature) for feature in (0, 1, 2, 11)] == [True, True, False, False]


# ---------------------------------------------------------------- in a run


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run precompute on 120 images, which are 15 blocks, with an encoder that takes no time; returns stdout."""
    write_dataset(tmp_path / "data", episodes=6, steps=20)

    def precompute(*flags: str) -> str:
        capsys.readouterr()
        place = ["--data_root", str(tmp_path / "data"), "--cache_dir", str(tmp_path / "cache")]
        with toy_encoder(ToyCheckpoint()):
            assert main(["precompute", "--vggt_model_path", "toy", *place, *SIZE, *flags]) == 0
        return capsys.readouterr().out

    return precompute


def test_a_run_looks_at_the_store_once_and_not_for_each_of_its_blocks(run, monkeypatch):
    looks = []
    real = Stored.refresh
    monkeypatch.setattr(Stored, "refresh", lambda stored: (looks.append(1), real(stored))[1])
    monkeypatch.setattr("vggt_cache.precompute.todo.LOOK_EVERY_S", 3600.0)
    assert "Processed 120 images" in run()
    assert len(looks) == 1


def test_what_another_process_finishes_meanwhile_shortens_the_bar_and_is_told(run, monkeypatch, capsys):
    """The other one has all; this one took its list of what is missing before."""
    time.sleep(SETTLE_S)
    monkeypatch.setattr(Stored, "all_missing", lambda stored: list(range(120)))
    run()
    out = run()
    assert "Processed 0 images" in out
    assert re.search(r"120 more were already stored", out)

"""The trials that go on for long, each for a moment, so that one that no longer works is noticed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from store_kit import DAMAGE_WARNING
from trials import children, fuzz, soak
from trials.children import Child
from trials.descriptors import descriptors
from trials.hostile_annotations import hostile_annotations
from trials.hostile_images import hostile_images
from trials.killed_runs import killed_runs
from trials.listing_races import listed_while_replaced
from trials.places import CASES, placed
from trials.registry import Unavailable
from trials.replaced_images import replaced_images
from trials.signalled import signals
from trials.sound_images import sound_files
from trials.stopped_runs import stopped_runs
from trials.toy_encoder import ToyCheckpoint
from vggt_cache.frames import decode_frame
from vggt_cache.identity import Preprocessing

QUICK = ToyCheckpoint(pause_s=0.004)
SMALL: dict[str, Callable[[int, Path], int]] = {
    "killed_runs": partial(killed_runs, trials=1, checkpoint=QUICK),
    "signals": partial(signals, trials=3, checkpoint=QUICK),
    "stopped_runs": partial(stopped_runs, trials=1),
    "listing_races": partial(listed_while_replaced, openings=2),
    "replaced_images": partial(replaced_images, trials=1),
    "hostile_images": partial(hostile_images, images=50),
    "hostile_annotations": partial(hostile_annotations, folders=2),
    "descriptors": partial(descriptors, shards=100),
    "places": placed,
    "soak": partial(soak.soak, minutes=2, ranks=2),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_trial_runs_and_counts(tmp_path: Path, name: str) -> None:
    assert SMALL[name](1, tmp_path) > 0


@DAMAGE_WARNING
@pytest.mark.parametrize("seed", range(6, len(CASES), 6))
def test_a_case_of_a_place_runs_outside_of_its_test(tmp_path: Path, seed: int) -> None:
    assert placed(seed, tmp_path) == 1


def test_without_atheris_nothing_is_fuzzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Unavailable, match="pip install atheris"):
        fuzz.fuzzed_headers(0, tmp_path)


def test_all_images_that_are_changed_were_sound_before() -> None:
    for files in sound_files().values():
        for data in files:
            assert decode_frame(data, Preprocessing(image_size=28)).shape[1:] == (28, 3)


def test_what_grows_is_found_by_the_soak() -> None:
    def uses(name: str, step: int) -> list[soak.Use]:
        flat = {"descriptors": 9, "anonymous_bytes": 2**27, "resident_bytes": 2**27}
        return [soak.Use(**{**flat, name: flat[name] + step * minute}) for minute in range(40)]

    soak._check_flat(uses("descriptors", 0))
    for name, step in (("descriptors", 1), ("anonymous_bytes", 2**16), ("resident_bytes", 2**16)):
        with pytest.raises(AssertionError, match=f"{name} grew"):
            soak._check_flat(uses(name, step))


def test_a_child_that_hangs_is_ended_and_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "STUCK_S", 0.2)
    with (
        Child(lambda: time.sleep(600), tmp_path / "log") as child,
        pytest.raises(AssertionError, match="hangs"),
    ):
        child.end()
    assert not child.runs()

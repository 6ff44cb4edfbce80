"""What a colleague who may write to a cache can put there: nothing is waited for, written through or believed.

Every kind of thing in every place; then the commands run on it, as somebody else would run them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from small_data import SIZE, plan_of, write_annotations, write_image
from trials.replaced_images import SETTLE_S
from trials.toy_encoder import ToyCheckpoint, toy_encoder, toy_feature
from vggt_cache import FeatureCache
from vggt_cache.cli import main
from vggt_cache.errors import VggtCacheError
from vggt_cache.identity import Preprocessing, frame_digest
from vggt_cache.precompute.digests import DigestTable, state_hash
from vggt_cache.small_files import file_state

INVALID, REFUSED, INCOMPLETE = 1, 2, 3
"""The data has one image that is none: a run that did all it could ends with INCOMPLETE."""

KINDS: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda place, victim: place.symlink_to(victim / "kept"),
    "a second name of a file": lambda place, victim: place.hardlink_to(victim / "kept"),
    "a link to a folder": lambda place, victim: place.symlink_to(victim),
    "a link to nothing": lambda place, victim: place.symlink_to(victim / "new"),
    "a link to a device": lambda place, victim: place.symlink_to("/dev/zero"),
    "a pipe": lambda place, victim: os.mkfifo(place),
    "a folder": lambda place, victim: place.mkdir(),
    "an endless file": lambda place, victim: (place.touch(), os.truncate(place, 1 << 40)),
}

PLACES = {
    "failures.jsonl": {INCOMPLETE},
    "digests": {INCOMPLETE},
    "digests/000000000000-0000000000000000.rows": {INCOMPLETE},
    "same": {INCOMPLETE},
    "same/000000000000-0000000000000000.rows": {INCOMPLETE},
    "STORE/claims": {REFUSED, INCOMPLETE},
    "STORE/claims/BLOCK.0": {INCOMPLETE},
    "STORE/spec.json": {REFUSED, INCOMPLETE},
    "STORE/index": {INCOMPLETE},
    "STORE/index/rows": {INCOMPLETE},
    "STORE/shards/000000000000-0000000000000000.safetensors": {INCOMPLETE},
    "STORE/shards": {REFUSED, INCOMPLETE},
}
"""And how precompute may end: REFUSED in one sentence, where the place is one without which nothing can be stored."""


class Shared:
    """A cache with the features of some images, and a folder of its user's that nobody else may change."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.data, self.cache, self.victim = root / "data", root / "cache", root / "victim"
        self._capsys = capsys
        self.images = [write_image(self.data / f"{number}.png", number) for number in range(3)]
        (self.data / "bad.png").write_bytes(b"no image")
        names = [*(path.name for path in self.images), "bad.png"]
        write_annotations(self.data / "train.jsonl", [[name] for name in names])
        assert self.precompute("--max_samples", "2")[0] == 0
        (self.victim / "deep").mkdir(parents=True)
        (self.victim / "kept").write_text("kept")
        self._before = self._state()

    def precompute(self, *flags: str) -> tuple[int, str]:
        place = ["--data_root", str(self.data), "--cache_dir", str(self.cache)]
        with toy_encoder(ToyCheckpoint()):
            return self.run(
                "precompute", "--vggt_model_path", "toy", "--feature_dtype", "float32", *place, *SIZE, *flags
            )

    def run(self, *arguments: str) -> tuple[int, str]:
        self._capsys.readouterr()
        code = main([*arguments])
        return code, self._capsys.readouterr().err

    def put(self, place: str, kind: str) -> None:
        (store,) = (path.parent for path in self.cache.glob("*/spec.json"))
        block = plan_of(self.data, "frame").blocks[0].block_id
        path = self.cache / place.replace("STORE", store.name).replace("BLOCK", block)
        if path.exists():
            path.rename(path.parent / "put aside")
        path.parent.mkdir(exist_ok=True)
        KINDS[kind](path, self.victim)

    def is_untouched(self) -> bool:
        return self._state() == self._before

    def serves_nothing_wrong(self) -> bool:
        try:
            with FeatureCache.open(self.cache) as cache:
                return all(self._is_right(cache, path) for path in self.images)
        except VggtCacheError:
            return True

    def stored(self) -> list[bool]:
        with FeatureCache.open(self.cache) as cache:
            return [cache.get([path]) is not None for path in self.images]

    def _is_right(self, cache: FeatureCache, path: Path) -> bool:
        feature = cache.get([path])
        return feature is None or torch.equal(
            feature, toy_feature([path.read_bytes()], "frame", Preprocessing(image_size=56))
        )

    def _state(self) -> dict[str, object]:
        return {
            str(path): (path.stat().st_mode, path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
            for path in (self.victim, *self.victim.rglob("*"))
        }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings("ignore:.*could not be saved", "ignore:.*unreadable", "ignore:.*damaged")
def test_whatever_stands_wherever_the_run_ends_and_writes_nowhere_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    monkeypatch.setenv("VGGT_CACHE_CLAIM_TTL_S", "0.2")
    shared = Shared(tmp_path, capsys)
    shared.put(place, kind)
    code, err = shared.precompute()
    assert code in PLACES[place], err
    assert "Traceback" not in err
    assert (code == REFUSED) == ("[ERROR]" in err)
    for command in (["verify"], ["info"], ["prune"], ["prune", "--damaged", "--yes"]):
        code, err = shared.run(command[0], str(shared.cache), *command[1:])
        assert code in (0, INVALID, REFUSED)
        assert "Traceback" not in err
    assert shared.is_untouched()
    assert shared.serves_nothing_wrong()


def test_wrong_digests_make_precompute_skip_and_serve_nothing_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = Shared(tmp_path, capsys)
    *_, image = shared.images
    time.sleep(SETTLE_S)
    state = file_state(str(image))
    assert state is not None
    digest = frame_digest(shared.images[0].read_bytes())
    DigestTable(str(shared.cache)).append([(state_hash(str(image), state), digest)])
    assert shared.precompute()[0] == INCOMPLETE
    assert shared.stored() == [True, True, False], "the third was taken for the first"
    assert shared.serves_nothing_wrong()
    assert shared.run("verify", str(shared.cache), "--data_root", str(shared.data))[0] == INVALID
    assert shared.precompute()[0] == INCOMPLETE
    assert shared.stored() == [True] * 3
    assert shared.serves_nothing_wrong()

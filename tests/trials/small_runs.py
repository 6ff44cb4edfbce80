"""Whole runs of `precompute`, each in a forked process: all is imported, and the encoder loaded, before the fork."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

import golden_recipe
from small_data import SIZE, write_dataset
from store_kit import make_spec
from trials.children import Child, End, exhaust_memory
from trials.toy_encoder import toy_encoder
from vggt_cache import cli
from vggt_cache.encoder import Encoder, EncoderConfig
from vggt_cache.identity import EncoderSpec, FeatureSpec
from vggt_cache.precompute import pipeline, run
from vggt_cache.precompute.report import FAILURES_FILE
from vggt_cache.store import FeatureCache
from vggt_cache.store.tensors import bytes_of

FLAGS = [
    *SIZE,
    "--batch_size",
    "1",
    "--feature_dtype",
    "float32",
    "--layer",
    "0",
    "--vggt_model_path",
    "loaded",
]
"""One frame a batch: then a feature's bits do not depend on which others were still missing."""


class LoadedCheckpoint:
    """Stands in for `Checkpoint`: the small encoder with the golden weights, in memory once."""

    layers = (0,)

    def __init__(self) -> None:
        config = EncoderConfig.from_dict(golden_recipe.SMALL_CONFIG)
        self._encoder = Encoder(config, layer=0)
        shapes = {name: tuple(weight.shape) for name, weight in self._encoder.state_dict().items()}
        self._encoder.load_state_dict(golden_recipe.make_weights(shapes))
        self._spec = replace(make_spec().encoder, embed_dim=config.embed_dim, depth=config.depth)

    def open(self, location: str, *, layer: Sequence[int]) -> LoadedCheckpoint:
        return self

    def spec(self, compute_dtype: str) -> EncoderSpec:
        return self._spec

    def load(self, *, device: str, compute_dtype: str, tokens: str, pool: None) -> Encoder:
        return self._encoder


@lru_cache(maxsize=1)
def small_checkpoint() -> LoadedCheckpoint:
    return LoadedCheckpoint()


def stored(cache_dir: Path) -> dict[bytes, bytes]:
    """All features with their keys, the same with and without the index; nothing may be damaged."""
    if not list(cache_dir.glob("*/spec.json")):
        return {}
    answers = []
    for use_index in (True, False):
        with FeatureCache.open(cache_dir, use_index=use_index) as cache:
            assert cache.damaged_shards == ()
            answers.append({key: bytes(bytes_of(cache.get_by_key(key))) for key in cache})
    assert answers[0] == answers[1]
    return answers[0]


def shard_count(cache_dir: Path) -> int:
    return len(list(cache_dir.glob("*/shards/*.safetensors")))


def temporary_shards(cache_dir: Path) -> list[Path]:
    return list(cache_dir.glob("*/shards/.tmp-*"))


@dataclass(frozen=True, kw_only=True)
class Spare:
    """What a run has left of memory, and from which feature on."""

    feature: int
    memory_bytes: int


def _run_short(spare: Spare) -> None:
    """In a child. All threads run by then: what comes too early only shows that no thread can be started."""
    key, number = pipeline.feature_key, count()

    def feature_key(spec: FeatureSpec, digests: Sequence[bytes]) -> bytes:
        if next(number) == spare.feature:
            exhaust_memory(spare.memory_bytes)
        return key(spec, digests)

    pipeline.feature_key = feature_key


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A small data set, an encoder, and what a run that nobody disturbs makes of them."""

    folder: Path
    checkpoint: Any
    """In the place of `run.Checkpoint`."""
    flags: tuple[str, ...]
    expected: dict[bytes, bytes]
    seconds: float
    """What the undisturbed run took."""

    @classmethod
    def make(cls, folder: Path, random: Random, checkpoint: Any) -> Scene:
        write_dataset(folder / "data", episodes=2, steps=random.randint(3, 5))
        flags = ("--context", random.choice(("frame", "causal")))
        empty = cls(folder=folder, checkpoint=checkpoint, flags=flags, expected={}, seconds=0.0)
        started_s = time.monotonic()
        empty.start(folder / "undisturbed").well()
        seconds, expected = time.monotonic() - started_s, stored(folder / "undisturbed")
        assert expected
        return replace(empty, expected=expected, seconds=seconds)

    @property
    def feature_bytes(self) -> int:
        return len(next(iter(self.expected.values()), b"."))

    def start(
        self,
        cache_dir: Path,
        *more: str,
        shard_records: int = 1,
        spare: Spare | None = None,
        prepare: Callable[[], object] | None = None,
        name: str = "",
    ) -> Child:
        """`precompute` in a process of its own; a shard is committed when it has so many records.

        `prepare` is called in the process first; `name` tells runs on one cache apart.
        """
        log = self.folder / f"{cache_dir.name}{name}.log"
        place = ["--data_root", str(self.folder / "data"), "--cache_dir", str(cache_dir)]
        arguments = ["precompute", *FLAGS, *place, *self.flags, *more]

        def body() -> int:
            # A lock of this process alone: one that is shared may be held for ever by a child that was killed.
            tqdm.set_lock(threading.RLock())
            if prepare is not None:
                prepare()
            os.environ["VGGT_CACHE_SHARD_BYTES"] = str(shard_records * self.feature_bytes)
            if spare is not None:
                _run_short(spare)
            if isinstance(self.checkpoint, LoadedCheckpoint):
                run.Checkpoint = self.checkpoint
                return cli.main(arguments)
            with toy_encoder(self.checkpoint):
                return cli.main(arguments)

        return Child(body, log)

    def wait_at_random(self, child: Child, cache_dir: Path, random: Random) -> None:
        """Until a moment of the run, or until some shards are there and the next one is under way."""
        if random.random() < 0.5:
            child.wait(random.uniform(0.0, self.seconds))
            return
        wanted = shard_count(cache_dir) + random.randrange(len(self.expected))
        while shard_count(cache_dir) < wanted and child.runs():
            time.sleep(0.002)
        child.wait(random.uniform(0.0, self.seconds / len(self.expected)))

    def check(self, cache_dir: Path) -> set[bytes]:
        """Whatever is stored is whole and right; returns the keys of it."""
        found = stored(cache_dir)
        for key, feature in found.items():
            assert self.expected.get(key) == feature, f"the feature {key.hex()} is wrong"
        return set(found)

    def complete(self, cache_dir: Path) -> End:
        """Run again to the end: all features are there, and `--verify` finds nothing."""
        end = self.start(cache_dir, "--verify").well()
        assert f"{len(self.expected)}/{len(self.expected)} valid, 0 invalid" in end.said, end.said
        assert self.check(cache_dir) == set(self.expected)
        assert not (cache_dir / FAILURES_FILE).exists(), (cache_dir / FAILURES_FILE).read_text()
        return end

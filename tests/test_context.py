"""A context is one object, and all that depends on the context is asked of it."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from store_kit import make_spec
from vggt_cache.context import CONTEXTS, ContextRule
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.precompute.encode import BatchEncoder

SOURCES = Path(__file__).parent.parent / "src"
DIGESTS = [frame_digest(bytes([number])) for number in range(5)]
LISTS = [[0, 1, 2], [0, 1, 3], [4], [0]]


class SumEncoder:
    """What a frame shows is a number; a feature alone is that number, in a list all numbers of the list so far."""

    def frames(self, pixels):
        yield [float(one) for one in pixels]

    def lists(self, lists, pixels):
        yield [float(sum(pixels[frame] for frame in frames)) for frames in lists]

    joint_lists = lists


def test_nothing_but_the_contexts_themselves_asks_which_context_it_is():
    named = "|".join(CONTEXTS)
    asks = re.compile(
        rf"""[=!]= ["']({named})["']|["']({named})["'] [=!]=|isinstance\(\w+, \w*Rule\)|\.context =="""
    )
    found = [
        f"{path.relative_to(SOURCES)}:{number}"
        for path in SOURCES.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("rule", CONTEXTS.values(), ids=CONTEXTS)
class TestEachContext:
    def test_the_frames_that_are_used_alone_determine_the_key(self, rule: ContextRule) -> None:
        spec = make_spec(context=rule.name)
        assert spec.context_rule is rule
        for frames in LISTS:
            digests = [DIGESTS[frame] for frame in frames]
            assert feature_key(spec, digests) == feature_key(spec, rule.used(digests))

    def test_and_the_feature(self, rule: ContextRule) -> None:
        pixels = {number: number + 1 for number in range(5)}
        (features,) = rule.encode(SumEncoder(), LISTS, pixels)
        (again,) = rule.encode(SumEncoder(), [rule.used(frames) for frames in LISTS], pixels)
        assert features == again == [sum(pixels[frame] for frame in rule.used(frames)) for frames in LISTS]

    def test_a_wanted_list_is_all_used_and_ends_in_a_frame_of_the_sample(self, rule: ContextRule) -> None:
        frames = np.array([frame for one in LISTS for frame in one])
        offsets = np.cumsum([0, *map(len, LISTS)])
        flat, ends = rule.wanted_lists(frames, offsets)
        wanted = [flat[a:b].tolist() for a, b in itertools.pairwise(ends)]
        assert all(rule.used(one) == one for one in wanted)
        assert {one[-1] for one in LISTS} <= {one[-1] for one in wanted}
        for sample in LISTS:
            assert rule.used(sample) in wanted

    def test_what_comes_out_has_the_shape_that_is_said(
        self, rule: ContextRule, small_checkpoint: Path
    ) -> None:
        from vggt_cache.encoder import Checkpoint

        encoder = Checkpoint.open(str(small_checkpoint)).load()
        pixels = {number: np.full((28, 42, 3), number * 40, np.uint8) for number in range(3)}
        batches = rule.encode(BatchEncoder(encoder, 2, lambda size: None), [[0, 1, 2]], pixels)
        ((_, features),) = batches
        spec = make_spec(context=rule.name, embed_dim=encoder.config.embed_dim)
        assert features.shape[1:] == torch.Size(spec.shape((2, 3), frames=3))

    def test_messages_name_the_last_frame(self, rule: ContextRule) -> None:
        assert rule.label(["a.png"]) == "a.png"
        earlier = len(rule.used("abc")) - 1
        assert rule.label(["a.png", "b.png", "c.png"]) == "c.png" + (
            f" (after {earlier} earlier frames)" if earlier else ""
        )


def test_frame_uses_the_last_frame_and_the_others_all_of_them():
    assert {name: list(rule.used([1, 2, 3])) for name, rule in CONTEXTS.items()} == {
        "frame": [3],
        "causal": [1, 2, 3],
        "joint": [1, 2, 3],
    }

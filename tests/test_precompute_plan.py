"""Plans: every wanted feature in exactly one block, whoever plans; counts that equal a naive count."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from small_data import history, plan_of, write_annotations, write_dataset
from vggt_cache.precompute.encode import even_parts
from vggt_cache.precompute.plan import _distinct_lists, _distinct_prefixes

LISTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=30)


def flat(lists: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, lists)])
    return np.array([frame for frames in lists for frame in frames], np.int64), offsets.astype(np.int64)


@given(LISTS)
@settings(max_examples=200)
def test_distinct_lists_and_prefixes_equal_a_naive_count(lists):
    frames, offsets = _distinct_lists(*flat(lists))
    kept = [tuple(frames[a:b].tolist()) for a, b in itertools.pairwise(offsets)]
    assert kept == list(dict.fromkeys(map(tuple, lists)))
    prefixes = {one[: depth + 1] for one in kept for depth in range(len(one))}
    assert _distinct_prefixes(frames, offsets[:-1], np.diff(offsets)) == len(prefixes)


@given(st.integers(0, 200), st.integers(1, 40))
def test_batches_cover_all_in_order_and_differ_by_at_most_one(count, size):
    parts = list(even_parts(range(count), size))
    assert [position for part in parts for position in part] == list(range(count))
    lengths = {len(part) for part in parts}
    assert all(0 < length <= size for length in lengths)
    assert not lengths or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("context", ["frame", "causal"])
@pytest.mark.parametrize("limit", [-1, 1, 70, 10_000])
def test_every_wanted_feature_is_in_exactly_one_block(tmp_path, context, limit):
    write_dataset(tmp_path, episodes=6, steps=30)
    plan = plan_of(tmp_path, context, limit)
    features = [feature for block in plan.blocks for feature in block.features]
    assert sorted(features) == list(range(len(plan)))
    assert len(plan) == min(180, limit if limit > 0 else 180)
    assert len({block.block_id for block in plan.blocks}) == len(plan.blocks)


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_processes_with_other_limits_and_other_mounts_agree_on_block_ids(tmp_path, context):
    write_dataset(tmp_path / "data", episodes=6, steps=30)
    all_ids = [block.block_id for block in plan_of(tmp_path / "data", context).blocks]
    some_ids = [block.block_id for block in plan_of(tmp_path / "data", context, 70).blocks]
    assert 0 < len(some_ids) < len(all_ids)
    assert some_ids == all_ids[: len(some_ids)]
    (tmp_path / "data").rename(tmp_path / "mounted elsewhere")
    assert [block.block_id for block in plan_of(tmp_path / "mounted elsewhere", context).blocks] == all_ids


def test_lists_that_share_a_prefix_are_never_split_over_blocks(tmp_path):
    write_dataset(tmp_path, episodes=5, steps=50)
    plan = plan_of(tmp_path, "causal")
    block_of_first: dict[int, str] = {}
    for block in plan.blocks:
        for feature in block.features:
            first = int(plan.frames_of(feature)[0])
            assert block_of_first.setdefault(first, block.block_id) == block.block_id


def test_a_sixty_step_episode_costs_one_pass_per_distinct_prefix(tmp_path):
    names = [f"{step:04d}.png" for step in range(60)]
    write_annotations(
        tmp_path / "train.jsonl", [[names[frame] for frame in history(step)] for step in range(60)]
    )
    plan = plan_of(tmp_path, "causal")
    lists = [tuple(history(step)) for step in range(60)]
    prefixes = {one[: depth + 1] for one in lists for depth in range(len(one))}
    assert plan.passes(range(len(plan))) == (sum(map(len, lists)), len(prefixes))


def test_samples_of_text_alone_are_counted_and_need_nothing(tmp_path):
    records = [{"images": ["a.png"]}, {"conversations": []}, {"images": ["b.png"]}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    plan = plan_of(tmp_path, "causal")
    assert (plan.sample_count, plan.text_only_count, len(plan)) == (3, 1, 2)


def test_planning_opens_no_image(tmp_path, monkeypatch):
    write_dataset(tmp_path)
    for path in tmp_path.rglob("*.png"):
        path.chmod(0)
    import builtins
    import os

    def refuse_images(real):
        def opened(path, *arguments, **options):
            assert not str(path).endswith(".png")
            return real(path, *arguments, **options)

        return opened

    monkeypatch.setattr(builtins, "open", refuse_images(builtins.open))
    monkeypatch.setattr(os, "open", refuse_images(os.open))
    assert len(plan_of(tmp_path, "frame")) == 12

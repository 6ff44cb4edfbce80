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
from vggt_cache.precompute.plan import LEAST_PER_BLOCK, _distinct_lists, _distinct_prefixes, block_bounds

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


@given(st.lists(st.integers(1, 200), max_size=300), st.sampled_from([32, 64]))
@settings(max_examples=200)
def test_blocks_are_whole_trees_and_each_ends_with_the_first_that_fills_it(sizes, most):
    trees = np.cumsum([0, *sizes])[1:]
    bounds = block_bounds(trees, most)
    assert bounds[0] == 0
    assert bounds[-1] == sum(sizes)
    for begin, end in itertools.pairwise(bounds):
        assert end in trees
        inside = [tree for tree in trees if begin < tree < end]
        assert not inside or inside[-1] - begin < most


def test_blocks_get_smaller_towards_the_end_so_that_the_last_ones_are_shared():
    total = 100_000
    sizes = np.diff(block_bounds(np.arange(1, total + 1), 64))
    assert sizes[0] == 64
    assert (np.diff(sizes) <= 0).all()
    assert sizes[-1] <= LEAST_PER_BLOCK
    left = total - np.cumsum(sizes) + sizes
    assert (sizes <= np.maximum(left / 256, LEAST_PER_BLOCK)).all()
    assert len(sizes) < 1.5 * total / 64, "few of them are small"


def test_a_small_plan_has_blocks_for_several_processes():
    assert len(block_bounds(np.arange(1, 201), 64)) > 20


@pytest.mark.parametrize("context", ["frame", "causal"])
def test_the_features_that_use_a_frame_are_those_whose_list_has_it(tmp_path, context):
    write_dataset(tmp_path, episodes=3, steps=10)
    plan = plan_of(tmp_path, context, 25)
    wanted = np.zeros(len(plan.frames), np.bool_)
    wanted[[0, 3, 17]] = True
    expected = [bool(wanted[plan.frames_of(feature)].any()) for feature in range(len(plan))]
    assert plan.which_use(wanted).tolist() == expected


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

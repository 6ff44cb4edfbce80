"""Delivery: any trainer's batches arrive with their features, read one batch ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from store_kit import equal, make_feature, make_key, make_spec, write_shard
from vggt_cache.delivery import Delivery
from vggt_cache.errors import MissingFeatureError, SettingsError
from vggt_cache.identity import feature_key, frame_digest
from vggt_cache.store import FeatureCache, ShardWriter, create_store

CAUSAL = make_spec(context="causal")
FRAMES = [bytes([number]) * 20 for number in range(6)]
"""As good as image files: reading a feature decodes none."""


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[FeatureCache]:
    """Holds the features of the first one, two, ... six frames, under their numbers."""
    with ShardWriter(create_store(tmp_path, CAUSAL), CAUSAL) as writer:
        for count in range(1, 7):
            key = feature_key(CAUSAL, [frame_digest(frame) for frame in FRAMES[:count]])
            writer.append(key, make_feature(count, CAUSAL))
        writer.commit()
    with FeatureCache.open(tmp_path, context="causal") as opened:
        yield opened


class Lists(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"number": index + 1, "frames": FRAMES[: index + 1]}


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    numbers = torch.tensor([item["number"] for item in items])
    return {"numbers": numbers, "frames": [item["frames"] for item in items]}


class Loader:
    """Batches, and a note of how many have been taken."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches, self.taken = batches, 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.taken += 1
            yield batch


def right(batch: Mapping[str, Any]) -> bool:
    numbers = batch["numbers"].tolist()
    pairs = zip(batch["features"], numbers, strict=True)
    return "frames" not in batch and all(equal(one, make_feature(number, CAUSAL)) for one, number in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_every_epoch_of_a_plain_loop_has_the_right_features(cache: FeatureCache, workers: int) -> None:
    loader: DataLoader[Any] = DataLoader(
        Lists(), batch_size=4, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    delivery = Delivery(cache, "cpu")
    for _ in range(3):
        batches = list(delivery.ahead(loader))
        assert [len(batch["features"]) for batch in batches] == [4, 2]
        assert all(map(right, batches))  # of the first batch too, though another was read since
    assert cache.stats.hits == 18
    delivery.close()


def test_an_epoch_that_ends_early_leaves_nothing_behind(cache: FeatureCache) -> None:
    loader = Loader([collate([item]) for item in map(Lists().__getitem__, range(6))])
    delivery = Delivery(cache, "cpu")
    next(delivery.ahead(loader))
    batches = list(delivery.ahead(loader))
    assert [batch["numbers"].item() for batch in batches] == [1, 2, 3, 4, 5, 6]
    assert all(map(right, batches))


def test_the_next_batch_is_read_while_this_one_is_used(cache: FeatureCache) -> None:
    loader = Loader([collate([item]) for item in map(Lists().__getitem__, range(3))])
    delivery = Delivery(cache, "cpu")
    ahead = delivery.ahead(loader)
    assert right(next(ahead))
    assert loader.taken == 2
    until_s = time.monotonic() + 30
    while cache.stats.hits < 2:  # by reading threads, while nobody asks for it
        assert time.monotonic() < until_s
        time.sleep(0.001)
    delivery.close()


def test_the_same_iterator_goes_on_where_it_was(cache: FeatureCache) -> None:
    iterator = iter(Loader([collate([item]) for item in map(Lists().__getitem__, range(3))]))
    delivery = Delivery(cache, "cpu")
    assert [next(delivery.ahead(iterator))["numbers"].item() for _ in range(3)] == [1, 2, 3]
    assert next(delivery.ahead(iterator), None) is None


def test_keys_serve_as_well_as_frames(cache: FeatureCache) -> None:
    keys = [cache.key_of(FRAMES[:2]), cache.key_of(FRAMES[:5])]
    batch = Delivery(cache, "cpu", frames="keys", features="seen").deliver({"keys": keys, "other": 7})
    assert batch.keys() == {"other", "seen"}
    assert [equal(one, make_feature(n, CAUSAL)) for one, n in zip(batch["seen"], (2, 5), strict=True)] == [
        True,
        True,
    ]


def test_a_batch_without_frames_stays_as_it_is(cache: FeatureCache) -> None:
    assert Delivery(cache, "cpu").deliver({"input_ids": 1}) == {"input_ids": 1}


def test_what_the_cache_lacks_is_an_error_unless_something_computes_it(cache: FeatureCache) -> None:
    batch = {"frames": [FRAMES[:1], FRAMES[:2][::-1], FRAMES[:3]]}
    with pytest.raises(MissingFeatureError, match="precompute it, or give miss="):
        Delivery(cache, "cpu").deliver(batch)
    asked = []

    def compute(wanted: Sequence[Any]) -> list[torch.Tensor]:
        asked.append(list(wanted))
        return [torch.full((2, 3, 4), 9.0)]

    first, second, third = Delivery(cache, "cpu", miss=compute).deliver(batch)["features"]
    assert asked == [[FRAMES[:2][::-1]]]
    assert equal(first, make_feature(1, CAUSAL))
    assert equal(second, torch.full((2, 3, 4), 9.0))
    assert equal(third, make_feature(3, CAUSAL))


def test_a_batch_of_another_form_is_refused(cache: FeatureCache) -> None:
    with pytest.raises(SettingsError, match=r"tuple.*named entries"):
        next(Delivery(cache, "cpu").ahead([(1, 2)]))  # type: ignore[list-item]


# ---------------------------------------------------------------- transformers' Trainer


class SumOfFeatures(nn.Module):
    """Keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[bool] = []

    def forward(self, numbers: torch.Tensor, features: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        self.seen.append(right({"numbers": numbers, "features": features}))
        return {"loss": self.weight.sum() * sum(one.float().mean() for one in features)}


class WithFeatures(Trainer):
    """As the page for other trainers shows it."""

    delivery: Delivery

    def get_batch_samples(self, epoch_iterator: Any, *rest: Any) -> Any:
        return super().get_batch_samples(self.delivery.ahead(epoch_iterator), *rest)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super()._prepare_inputs(self.delivery.deliver(inputs))


def test_transformers_trainer_trains_evaluates_and_resumes_with_features(
    cache: FeatureCache, tmp_path: Path
) -> None:
    def trained(steps: int, resume: bool) -> tuple[SumOfFeatures, WithFeatures]:
        model = SumOfFeatures()
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=1, gradient_accumulation_steps=2,
            max_steps=steps, save_steps=2, report_to=[], use_cpu=True, remove_unused_columns=False,
            disable_tqdm=True, per_device_eval_batch_size=2,
        )  # fmt: skip
        trainer = WithFeatures(
            model=model, args=arguments, train_dataset=Lists(), eval_dataset=Lists(), data_collator=collate
        )
        trainer.delivery = Delivery(cache, trainer.args.device)
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    model, trainer = trained(2, resume=False)
    assert model.seen == [True] * 4
    trainer.evaluate()
    assert model.seen == [True] * 7
    model, _ = trained(4, resume=True)  # from the middle of an epoch
    assert model.seen == [True] * 4


def test_wherever_a_feature_lies_its_own_is_read(tmp_path: Path) -> None:
    """Grids of several sizes through the same threads and buffers."""
    spec = make_spec()
    grids = {1: (2, 3), 2: (4, 5), 3: (2, 3), 4: (1, 1)}
    write_shard(tmp_path, {n: make_feature(n, spec, *grid) for n, grid in grids.items()}, spec)
    with FeatureCache.open(tmp_path, context="frame") as cache:
        delivery = Delivery(cache, "cpu")
        for _ in range(2):
            features = delivery.deliver({"frames": [make_key(n) for n in grids]})["features"]
            assert [
                equal(f, make_feature(n, spec, *grids[n])) for f, n in zip(features, grids, strict=True)
            ] == ([True] * 4)


def test_features_of_all_frames_of_a_list_arrive_in_their_own_shapes(tmp_path: Path) -> None:
    spec = make_spec(context="joint")
    shapes = {count: spec.shape((2, 3), frames=count) for count in (1, 2, 3)}
    stored = {count: torch.randn(shape).bfloat16() for count, shape in shapes.items()}
    write_shard(tmp_path, stored, spec)
    with FeatureCache.open(tmp_path, context="joint") as cache:
        features = Delivery(cache, "cpu").deliver({"frames": [make_key(count) for count in stored]})[
            "features"
        ]
    assert [equal(one, stored[count]) for one, count in zip(features, stored, strict=True)] == [True] * 3

"""transformers' Trainer, with features that come from a `FeatureSource` one micro-batch ahead of their use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerState

from janusvln.data.pixels import QwenPixels
from janusvln.features.source import FeatureSource
from janusvln.train.arguments import TrainingArguments
from janusvln.train.checkpoints import Maker, load_weights
from janusvln.train.learning_rates import parameter_groups
from janusvln.train.order import EpochOrder, LengthGroupedOrder
from janusvln.train.ranks import Ranks
from janusvln.train.speed import Speed

Batch = dict[str, Any]


class FeatureTrainer(Trainer):
    """A Trainer whose batches carry `feature_requests`: before the model sees them, they become images and features."""

    args: TrainingArguments

    def __init__(
        self,
        *args: Any,
        source: FeatureSource,
        pixels: QwenPixels,
        companions: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        """`companions`: files that are copied beside every saved model, so that it can be used alone."""
        super().__init__(*args, **kwargs)
        self.source = source
        self.pixels = pixels.on(self.args.device)
        self.companions = companions
        self.order = EpochOrder(0, seed=0)
        self.speed = Speed()
        self._ahead: _LookAhead | None = None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        if self._ahead is None or self._ahead.inner is not epoch_iterator:
            self.source.forget()
            self._ahead = _LookAhead(epoch_iterator, self.source)
        began_s = time.perf_counter()
        found: tuple[list[Batch], torch.Tensor | int | None] = super().get_batch_samples(
            self._ahead, num_batches, device
        )
        self.speed.data_s += time.perf_counter() - began_s
        return found

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        requests = inputs.get("feature_requests")
        inputs = {name: value for name, value in inputs.items() if name != "feature_requests"}
        if requests:
            frames = [request.frames.to(self.args.device, non_blocking=True) for request in requests]
            inputs["pixel_values"] = torch.cat([self.pixels.values(frame) for frame in frames])
            inputs["spatial_features"] = self.source.take(requests)
        prepared: Batch = super()._prepare_inputs(inputs)
        return prepared

    def training_step(self, model: torch.nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.speed.samples += _samples_in(inputs)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.source.step_done()
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self.speed.take(self.source, self.args.device)}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(trained))
            groups = parameter_groups(trained, self.args, decaying)
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer = optimizer_class(groups, **settings)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if self.args.group_by_modality_length:
            at_once = self.args.train_batch_size * self.args.world_size
            self.order = LengthGroupedOrder(dataset.lengths, group_size=at_once, seed=seed)
        else:
            self.order = EpochOrder(len(dataset), seed=seed)
        return self.order

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trained: Any = self.model if model is None else model
        load_weights(trained, resume_from_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            Maker.of(self.args).write(output_dir or str(self.args.output_dir))
            for path in self.companions:
                shutil.copy2(
                    path, os.path.join(output_dir or str(self.args.output_dir), os.path.basename(path))
                )


class EpochCallback(TrainerCallback):
    """At the start of an epoch: its order of samples, and what has been stored so far."""

    def __init__(self, trainer: FeatureTrainer, ranks: Ranks, *, fills: bool) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._fills = fills

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        # Set here, because the loader that resumes within an epoch does not pass it on to the sampler of every rank.
        self._trainer.order.set_epoch(epoch)
        if self._fills:
            self._trainer.source.flush()
            self._ranks.exchange(f"filled/{epoch}", "")
            self._trainer.source.refresh()


def _samples_in(batch: Batch) -> int:
    """Samples of a padded batch, one a row; of a packed one, those that have images."""
    return len(batch["input_ids"]) if "attention_mask" in batch else len(batch.get("feature_requests", ()))


class _LookAhead:
    """Batches of an epoch, each taken from the loader one before it is asked for, to read its features meanwhile."""

    def __init__(self, inner: Iterator[Batch], source: FeatureSource) -> None:
        self.inner = inner
        self._source = source
        self._next = self._pull()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._next is None:
            raise StopIteration
        batch, self._next = self._next, self._pull()
        return batch

    def _pull(self) -> Batch | None:
        batch = next(self.inner, None)
        if batch is not None and batch.get("feature_requests"):
            self._source.expect(batch["feature_requests"])
        return batch

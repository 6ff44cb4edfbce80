"""transformers' Trainer, with features that come from a `FeatureSource` one micro-batch ahead of their use."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from janusvln.data.images import QwenPixels
from janusvln.features.source import FeatureSource
from janusvln.model.checkpoints import copy_settings
from janusvln.model.modeling_qwen2_5_vl import learned
from janusvln.train.arguments import TrainingArguments
from janusvln.train.checkpoints import TRAINER_STATE, load_weights, sync_tree, writing
from janusvln.train.learning import parameter_groups
from janusvln.train.order import EpochOrder, LengthGroupedOrder
from janusvln.train.ranks import Ranks
from janusvln.train.run_record import RunRecord
from janusvln.train.speed import Speed
from janusvln.train.stop import shield
from janusvln.train.workers import end_where_it_cannot_send
from vggt_cache.errors import NotFiniteError, SettingsError, errors_as
from vggt_cache.output import expect_bar

Batch = dict[str, Any]
MAX_SCALED_DOWN = 50
"""float16 begins at a scale of 2**16 and halves it, at the slowest in every second step."""


class FeatureTrainer(Trainer):
    """A Trainer whose batches carry `feature_requests`: before the model sees them, they become images and features."""

    args: TrainingArguments

    def __init__(
        self,
        *args: Any,
        source: FeatureSource,
        pixels: QwenPixels,
        record: RunRecord,
        settings_from: Path | None = None,
        **kwargs: Any,
    ) -> None:
        """Beside every saved model: `record`, and the processor's settings of the model in `settings_from`."""
        super().__init__(*args, **kwargs)
        self.source = source
        self.pixels = pixels.on(self.args.device)
        self.record = record
        self.settings_from = settings_from
        self.order = EpochOrder(0, seed=0)
        self.speed = Speed()
        self._group_rates: list[float] = []
        """The learning rates that the optimizer's groups began with."""
        self._rates: dict[str, float] = {}
        """By flag, at the moment of which transformers logs `learning_rate`."""
        self._ahead: _LookAhead | None = None
        self._losses: torch.Tensor | float = 0.0
        """Sum of this optimizer step."""
        self._scaled_down = 0
        """Steps in succession that float16 left out, to find a scale at which its gradients are finite."""

        self._merged = False
        """Whether spatial features have reached the model: whatever replaces its forward, or wraps it, this tells."""
        model: Any = self.model
        self._merging = model.merger.register_forward_hook(self._has_merged)

    def _has_merged(self, *_: object) -> None:
        self._merged = True
        self._merging.remove()

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's own only passes reading on
        inner.worker_init_fn = partial(_begin_worker, then=inner.worker_init_fn)
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        if self._ahead is None or self._ahead.inner is not epoch_iterator:
            self.source.forget()
            self._ahead = _LookAhead(epoch_iterator, self.source)
        began_s = self.speed.begin()
        found: tuple[list[Batch], torch.Tensor | int | None] = super().get_batch_samples(
            self._ahead, num_batches, device
        )
        self.speed.data_s += time.perf_counter() - began_s
        self.speed.steps += bool(found[0])
        if self.args.loss_mean_over == "step" and found[0]:
            self._share_loss(found[0])
        return found

    def _share_loss(self, batches: list[Batch]) -> None:
        """Weigh micro-batches so that the mean over them, and over ranks, is one over all tokens of the step."""
        counts = torch.stack([learned(batch) for batch in batches]).to(self.args.device)
        total = torch.cat([counts.sum(0), counts.new_tensor([len(batches)])])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        shares = counts * total[2] / total[:2].where(total[:2] > 0, 1.0)
        for batch, share in zip(batches, shares, strict=True):
            batch["loss_shares"] = share

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        inputs = dict(inputs)
        shares = inputs.pop("loss_shares", None)  # which would be rounded to the engine's dtype
        if requests := inputs.pop("feature_requests", None):
            frames = [request.frames.to(self.args.device, non_blocking=True) for request in requests]
            inputs["pixel_values"] = torch.cat([self.pixels.values(frame) for frame in frames])
            inputs["spatial_features"] = self.source.take(requests)
        prepared: Batch = super()._prepare_inputs(inputs)
        if shares is not None:
            prepared["loss_shares"] = shares
        return prepared

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        # One a row of a padded batch; of a packed one, those that have images.
        samples = inputs["input_ids"] if "attention_mask" in inputs else inputs.get("feature_requests", ())
        self.speed.samples += len(samples)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        self.source.step_done()
        if not self._merged and inputs.get("feature_requests"):
            raise SettingsError(
                "the spatial merger took no part in the first step, so another forward than this project's model's is "
                "in use and a plain Qwen2.5-VL would be trained: remove what patches the model (such as liger_kernel)"
            )
        self._losses += loss.detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Asked by every rank in every step, for the gradients of all ranks. Raises NotFiniteError."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        loss, found = float(self._losses), 0.0 if norm is None else float(norm)
        self._losses = 0.0
        if math.isfinite(loss) and math.isfinite(found) and found >= 0:  # DeepSpeed says -1 for nan
            self._scaled_down = 0
        elif math.isfinite(loss) and self.args.fp16 and self._scaled_down < MAX_SCALED_DOWN:
            self._scaled_down += 1
        else:
            self._stop_at_nan(f"the loss is {loss} and the gradient's norm {found}")
        return norm

    def _stop_at_nan(self, what: str) -> NoReturn:
        output_dir = str(self.args.output_dir)
        last = get_last_checkpoint(output_dir) if os.path.isdir(output_dir) else None  # type: ignore[no-untyped-call]
        instead = f" from the weights of {last} (--model_name_or_path)" if last else ""
        raise NotFiniteError(
            f"{what} in step {self.state.global_step + 1}, which is no finite number, so that nothing would be learned "
            f"from here on: start{instead} with another --output_dir and a smaller --learning_rate, and look at the "
            "samples of this step"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self._rates, **self.speed.take(self.source, self.args.device)}
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.args, set(self.get_decay_parameter_names(trained)))
            fault = f"--optim {getattr(self.args.optim, 'value', self.args.optim)} cannot be used here"
            remedy = ": give adamw_torch_fused, or leave it out"
            with errors_as(SettingsError, fault, remedy, ImportError, TypeError, ValueError):
                optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)
                self.optimizer = optimizer_class(groups, **settings)
            self._group_rates = [group["lr"] for group in groups]
        return self.optimizer

    def _get_learning_rate(self) -> float:
        """That of --learning_rate's group. transformers takes the first one's, which is the vision tower's."""
        self._rates = self._rates_by_flag()
        return self._rates.get("learning_rate", float(super()._get_learning_rate()))

    def _rates_by_flag(self) -> dict[str, float]:
        """The present learning rates by the flags that set them; those that nothing learns with are not there."""
        now = [group["lr"] for group in self.optimizer.param_groups] if self.optimizer is not None else []
        given = {
            name: getattr(self.args, name) for name in ("learning_rate", "mm_projector_lr", "vision_tower_lr")
        }
        found = {name: rate for name, rate in given.items() if rate in self._group_rates}
        return {name: float(now[self._group_rates.index(rate)]) for name, rate in found.items()}

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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        directory = Path(str(self.args.output_dir), f"checkpoint-{self.state.global_step}")
        with writing(directory):
            if self.args.should_save:
                # One of an earlier run at this step would call the checkpoint whole that is half written.
                (directory / TRAINER_STATE).unlink(missing_ok=True)
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            if self.args.should_save:
                # Earlier ones go when the disk holds this one: a loss of power must not take both.
                sync_tree(directory)
                rotate_checkpoints(
                    str(self.args.output_dir), limit, self.state.best_model_checkpoint, use_mtime=True
                )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        with writing(Path(output_dir)):
            sync_tree(output_dir)  # on every rank: what another node has written is not rank 0's to sync
        # Rank 0 goes on to call the checkpoint whole, and to remove earlier ones: not before it is.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            model: Any = self.model
            weights = model.state_dict() if state_dict is None else state_dict
            wrong = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
            if wrong:
                self._stop_at_nan(f"{len(wrong)} weights of the model ({wrong[0]} first) are not finite")
        super()._save(output_dir, state_dict=state_dict)
        if self.args.should_save:
            directory = output_dir or str(self.args.output_dir)
            self.record.write(directory)
            if self.settings_from is not None:
                copy_settings(self.settings_from, Path(directory))


def _begin_worker(number: int, *, then: Callable[[int], Any] | None) -> None:
    """What a process of the loader does first; `then`: what it would have done."""
    end_where_it_cannot_send()
    shield()
    if then is not None:
        then(number)


class EpochCallback(TrainerCallback):
    """At the start of an epoch: its order of samples, and what has been stored so far. Knows when a bar is drawn."""

    def __init__(self, trainer: FeatureTrainer, ranks: Ranks, *, fills: bool) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._fills = fills

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        expect_bar(not args.disable_tqdm)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        expect_bar(False)

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        epoch = int(state.epoch or 0)
        # Set here, because the loader that resumes within an epoch does not pass it on to the sampler of every rank.
        self._trainer.order.set_epoch(epoch)
        if self._fills:
            self._trainer.source.flush()
            self._ranks.exchange(f"filled/{epoch}", "")
            self._trainer.source.refresh()


class _LookAhead(Iterator[Batch]):
    """Batches of an epoch, each taken from the loader one before it is asked for, to read its features meanwhile."""

    def __init__(self, inner: Iterator[Batch], source: FeatureSource) -> None:
        self.inner = inner
        self._source = source
        self._next = self._pull()

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

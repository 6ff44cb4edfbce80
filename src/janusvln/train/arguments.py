"""The flags of training, under the names that the field's launchers use.

Three groups beside transformers' own TrainingArguments. Nothing is without effect: an unknown flag, or one that
belongs to the published trainer and means nothing here, is refused with the reason.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import HfArgumentParser
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils.import_utils import is_flash_attn_2_available

from janusvln.data.dataset import DataOptions, flag
from janusvln.features.resolve import AS_PUBLISHED, WantedFeatures
from janusvln.features.source import MISS_POLICIES
from janusvln.model import lora
from janusvln.train.engine import check_file, check_values
from janusvln.train.samples import BAD_SAMPLES
from janusvln.train.spellings import modern
from vggt_cache.delivery import THREADS
from vggt_cache.errors import SettingsError
from vggt_cache.flags import about_flag
from vggt_cache.precompute.settings import MAX_PIXELS, MIN_PIXELS, PrecomputeSettings
from vggt_cache.store.direct import AUTO, IO_MODES, io_of
from vggt_cache.store.staged import Staging


@dataclass
class ModelArguments:
    """What is trained, and which parts of it."""

    model_name_or_path: str | None = flag(None, "Qwen2.5-VL, a checkpoint made here, or a released JanusVLN")
    tune_mm_llm: bool = flag(False, "train the language model")
    tune_mm_vision: bool = flag(False, "train the vision tower")
    tune_mm_mlp: bool = flag(False, "train the vision tower's merger; the spatial merger is always trained")
    lam: float | None = flag(None, "weight of the spatial features (default: the checkpoint's, else 0.2)")
    action_head: bool = flag(False, "train a 4-class action head beside the language model")
    distill_loss_weight: float = flag(1.0, "weight of the action head's loss")
    reference_frame: str = flag("first", "only `first` is supported")
    attn_implementation: str | None = flag(None, "default: flash_attention_2 if installed, else sdpa")
    lora_enable: bool = flag(False, "the language model learns by LoRA; its own weights stay as they are")
    lora_r: int | None = flag(None, "rank of LoRA's matrices (default: 64)")
    lora_alpha: float | None = flag(None, "what LoRA adds is weighed by this over the rank (default: 128)")
    lora_dropout: float | None = flag(None, "of LoRA's input (default: 0)")
    lora_target_modules: str | None = flag(
        None, f"linear layers of the language model, with commas (default: all, {','.join(lora.TARGETS)})"
    )
    lora_bias: str = flag("none", "only `none` is supported")

    def __post_init__(self) -> None:
        if not self.model_name_or_path:
            raise SettingsError(
                "--model_name_or_path is missing, so there is nothing to train: give the directory of Qwen2.5-VL"
            )
        if self.reference_frame != "first":
            raise SettingsError(
                f"--reference_frame {self.reference_frame} is refused: the published trainer never hands this flag to "
                "its model, so every released model was trained with first; give first, or leave it out"
            )
        if self.attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise SettingsError(
                "--attn_implementation flash_attention_2 needs the package flash_attn and a GPU that it supports, and "
                f"one of them is missing: run {sys.executable} -m pip install flash-attn --no-build-isolation, or "
                "leave the flag out"
            )
        self._check_lora()
        if self.distill_loss_weight != 1.0 and not self.action_head:
            raise SettingsError(
                f"--distill_loss_weight {self.distill_loss_weight} weighs the action head's loss, and there is no "
                "action head: add --action_head True, or leave it out"
            )

    def _check_lora(self) -> None:
        names = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        values = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if self.lora_enable:
            lora.need_peft()
        elif values:
            name, value = next(iter(values.items()))
            raise SettingsError(
                f"--{name} {value} has no effect without LoRA: add --lora_enable True, or leave it out"
            )
        if self.lora_bias != "none":
            raise SettingsError(
                f"--lora_bias {self.lora_bias} is not supported, biases stay as they are: give none, or leave it out"
            )
        rank, alpha, dropout = self.lora_r, self.lora_alpha, self.lora_dropout
        for name, allowed, fits in (
            ("lora_r", "1 or more", rank is None or rank >= 1),
            ("lora_alpha", "more than 0", alpha is None or 0 < alpha < math.inf),
            ("lora_dropout", "0 or more, and less than 1", dropout is None or 0 <= dropout < 1),
        ):
            if not fits:
                raise SettingsError(f"--{name} {values[name]} is out of range: give {allowed}")


@dataclass(frozen=True, kw_only=True)
class DataArguments(DataOptions):
    """What it is trained on."""

    train_data_root: str | None = flag(None, "folder with annotations (*.jsonl, *.json) or episode folders")
    annotation_path: str | None = flag(None, "annotation files, separated by commas, instead of a data root")
    data_path: str | None = flag(None, "folder that relative image names start from; with --annotation_path")
    max_samples: int = flag(-1, "only the first N samples; -1: all")
    min_pixels: int = flag(MIN_PIXELS, "of an image given to Qwen; fewer is refused")
    max_pixels: int = flag(MAX_PIXELS, "of an image given to Qwen; more is refused")
    bad_samples: str = flag(
        "stop", "what cannot be trained on ends the run before step 1 (stop), or is left out (skip)"
    )
    data_flatten: bool = flag(False, "pack the samples of a batch into one row, without padding")

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.train_data_root) == bool(self.annotation_path):
            raise SettingsError(
                f"--train_data_root is {self.train_data_root} and --annotation_path is {self.annotation_path}: give "
                "exactly one of them, to say what is trained on"
            )
        if self.data_path and not self.annotation_path:
            raise SettingsError(
                f"--data_path {self.data_path} goes with --annotation_path; with --train_data_root names start there"
            )
        if self.bad_samples not in BAD_SAMPLES:
            raise SettingsError(f"--bad_samples {self.bad_samples} is none of {', '.join(BAD_SAMPLES)}")
        if self.max_samples == 0 or self.max_samples < -1:
            raise SettingsError(
                f"--max_samples {self.max_samples} selects nothing: give a number, or -1 for all"
            )


@dataclass
class FeatureArguments(WantedFeatures):
    """Where VGGT's features come from. What is left open is as the cache has it."""

    vggt_cache_dir: str | None = flag(None, "feature cache (default: the environment's VGGT_CACHE_DIR)")
    vggt_cache_miss: str = flag("encode", f"what a missing feature means: {', '.join(MISS_POLICIES)}")
    vggt_model_path: str | None = flag(None, "VGGT, needed only where a feature is not in the cache")
    vggt_cache_threads: int = flag(THREADS, "threads of each rank that read features")
    vggt_cache_io: str | None = flag(
        None,
        f"how features are read: {', '.join(IO_MODES)} (default: the environment's VGGT_CACHE_IO, else {AUTO})",
    )
    vggt_cache_stage: str | None = flag(
        None, "directory on a disk of this machine where features are kept, and looked for first"
    )
    vggt_cache_stage_limit: str | None = flag(
        None, "of all that lies there, such as 2TB (default: all but a tenth of its disk)"
    )

    @property
    def stage(self) -> Staging | None:
        """Raises SettingsError."""
        given, limit = self.vggt_cache_stage, self.vggt_cache_stage_limit
        return None if given is None else Staging(local_dir=given, limit=limit)

    def __post_init__(self) -> None:
        staged = ("vggt_cache_stage", "vggt_cache_stage_limit")
        for name in ("vggt_cache_dir", "vggt_cache_fingerprint", *staged):
            known = name not in staged or self.vggt_cache_dir  # a run without a cache may find them set
            setattr(
                self, name, getattr(self, name) or (os.environ.get(name.upper()) if known else None) or None
            )
        choices = {name: about_flag(PrecomputeSettings, name)["choices"] for name in AS_PUBLISHED}
        choices |= {"vggt_cache_miss": MISS_POLICIES, "vggt_cache_io": IO_MODES}
        for name, allowed in choices.items():
            if allowed and getattr(self, name) not in (None, *allowed):
                raise SettingsError(f"--{name} {getattr(self, name)} is none of {', '.join(allowed)}")
        self.vggt_cache_io = io_of(self.vggt_cache_io)
        if self.vggt_cache_miss != "encode" and not self.vggt_cache_dir:
            raise SettingsError(
                f"--vggt_cache_miss {self.vggt_cache_miss} needs a cache, and neither VGGT_CACHE_DIR nor "
                "--vggt_cache_dir names one"
            )
        for name, needed in (("vggt_cache_stage", "vggt_cache_dir"), (staged[1], staged[0])):
            if getattr(self, name) and not getattr(self, needed):
                raise SettingsError(
                    f"--{name} {getattr(self, name)} has no effect without --{needed}: give that too (in the "
                    f"environment {needed.upper()}), or leave it out"
                )
        _ = self.stage
        if self.vggt_cache_threads < 1:
            raise SettingsError(f"--vggt_cache_threads {self.vggt_cache_threads}: give 1 or more")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and what the published trainer adds to them."""

    mm_projector_lr: float | None = flag(None, "learning rate of the mergers (default: --learning_rate)")
    vision_tower_lr: float | None = flag(None, "learning rate of the vision tower (default: --learning_rate)")
    group_by_modality_length: bool = flag(False, "batches of samples of similar length")
    cache_dir: str | None = flag(None, "where models from the hub are kept")
    loss_mean_over: str = flag(
        "micro_batch",
        "of a step, the loss is the mean of micro-batches' means, or over all its tokens (step)",
    )

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the collator needs fields that the model does not take
        self.logging_nan_inf_filter = False  # it would log a mean in place of a loss that is no number
        for name, reason in UNDONE.items():
            value = getattr(self, name, None)
            if value != getattr(transformers.TrainingArguments, name, None):
                raise SettingsError(f"--{name} {value}: {reason}: leave it out")
        if self.save_strategy == "best":
            raise SettingsError(
                f"--save_strategy best: {UNDONE['load_best_model_at_end']}: give steps or epoch"
            )
        check_file(self.deepspeed)
        super().__post_init__()  # type: ignore[no-untyped-call]
        check_values(self)
        _check_loggers(self.report_to)
        if self.loss_mean_over not in LOSS_MEANS:
            raise SettingsError(f"--loss_mean_over {self.loss_mean_over} is none of {', '.join(LOSS_MEANS)}")
        for name, given in (("eval_strategy", self.do_eval), ("do_predict", self.do_predict)):
            if given:
                raise SettingsError(
                    f"--{name}: there is no evaluation data set, a navigation model is evaluated in the simulator: "
                    "leave it out"
                )
        for name in ("mm_projector_lr", "vision_tower_lr"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise SettingsError(f"--{name} {value} is negative: give a learning rate, or leave it out")


UNDONE = {
    "enable_jit_checkpoint": "its checkpoint is written at another step on each rank, and nothing can go on from it; a "
    "run that gets SIGTERM, SIGUSR1 or Ctrl-C writes one by itself",
    "load_best_model_at_end": "there is no evaluation data set that could say which checkpoint is the best",
    "ignore_data_skip": "a run that goes on would see the first samples of its epoch twice",
    "auto_find_batch_size": "a batch that changes within a run gives some samples twice and others never",
    "use_liger_kernel": "it would replace the model's forward by plain Qwen2.5-VL's, which takes no spatial features",
    "train_sampling_strategy": "samples come in random order, or by length with --group_by_modality_length True",
    "label_smoothing_factor": "it would replace the model's own loss, with its weights of lines and actions",
}
"""Flags of transformers that would do nothing here, or undo something: they keep their defaults."""


def _check_loggers(names: Any) -> None:
    """Raises SettingsError for a logger of --report_to that is unknown or not installed."""
    installed = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise SettingsError(
                f"--report_to {name} is none of {', '.join(INTEGRATION_TO_CALLBACK)}: give one, or none"
            )
        if name not in installed:
            raise SettingsError(
                f"--report_to {name} needs a package that is not installed for {sys.executable}: run {sys.executable} "
                f"-m pip install {name.replace('_', '-')}, or give --report_to none"
            )


LOSS_MEANS = ("micro_batch", "step")

Arguments = tuple[ModelArguments, DataArguments, FeatureArguments, TrainingArguments]


class _Parser(HfArgumentParser):
    """Refuses in one sentence."""

    def error(self, message: str) -> Any:
        raise SettingsError(f"{message}; python -m janusvln.train --help lists the flags")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The four groups. Raises SettingsError, in one sentence, for what is unknown or contradictory."""
    groups = (ModelArguments, DataArguments, FeatureArguments, TrainingArguments)
    parser = _Parser(groups, allow_abbrev=False)  # type: ignore[arg-type]
    given = [modern(argument) for argument in argv]
    try:
        parsed = parser.parse_args_into_dataclasses(args=given, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"the settings cannot be used: {' '.join(str(error).split())}") from error
    model, data, features, training = parsed
    return model, data, features, training

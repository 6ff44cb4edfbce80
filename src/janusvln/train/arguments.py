"""The flags of training, under the names that the field's launchers use.

Three groups beside transformers' own TrainingArguments. Nothing is without effect: an unknown flag, or one that
belongs to the published trainer and means nothing here, is refused with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import HfArgumentParser

from janusvln.data.dataset import DataOptions, flag
from janusvln.features.resolve import AS_PUBLISHED, WantedFeatures
from janusvln.features.source import MISS_POLICIES
from vggt_cache.delivery import THREADS
from vggt_cache.errors import SettingsError
from vggt_cache.flags import about_flag
from vggt_cache.precompute.settings import PrecomputeSettings


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
        if self.distill_loss_weight != 1.0 and not self.action_head:
            raise SettingsError(
                f"--distill_loss_weight {self.distill_loss_weight} weighs the action head's loss, and there is no "
                "action head: add --action_head True, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class DataArguments(DataOptions):
    """What it is trained on."""

    train_data_root: str | None = flag(None, "folder with annotations (*.jsonl, *.json) or episode folders")
    annotation_path: str | None = flag(None, "annotation files, separated by commas, instead of a data root")
    data_path: str | None = flag(None, "folder that relative image names start from; with --annotation_path")
    max_samples: int = flag(-1, "only the first N samples; -1: all")
    min_pixels: int = flag(16 * 28 * 28, "of an image given to Qwen; fewer is refused")
    max_pixels: int = flag(576 * 28 * 28, "of an image given to Qwen; more is refused")
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

    def __post_init__(self) -> None:
        self.vggt_cache_dir = self.vggt_cache_dir or os.environ.get("VGGT_CACHE_DIR") or None
        choices = {name: about_flag(PrecomputeSettings, name)["choices"] for name in AS_PUBLISHED}
        choices["vggt_cache_miss"] = MISS_POLICIES
        for name, allowed in choices.items():
            if allowed and getattr(self, name) not in (None, *allowed):
                raise SettingsError(f"--{name} {getattr(self, name)} is none of {', '.join(allowed)}")
        if self.vggt_cache_miss != "encode" and not self.vggt_cache_dir:
            raise SettingsError(
                f"--vggt_cache_miss {self.vggt_cache_miss} needs a cache, and neither VGGT_CACHE_DIR nor "
                "--vggt_cache_dir names one"
            )
        if self.vggt_cache_threads < 1:
            raise SettingsError(f"--vggt_cache_threads {self.vggt_cache_threads}: give 1 or more")


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' own, and what the published trainer adds to them."""

    mm_projector_lr: float | None = flag(None, "learning rate of the mergers (default: --learning_rate)")
    vision_tower_lr: float | None = flag(None, "learning rate of the vision tower (default: --learning_rate)")
    group_by_modality_length: bool = flag(False, "batches of samples of similar length")
    cache_dir: str | None = flag(None, "where models from the hub are kept")

    def __post_init__(self) -> None:
        self.remove_unused_columns = False  # the collator needs fields that the model does not take
        self.logging_nan_inf_filter = False  # it would log a mean in place of a loss that is no number
        for name, reason in UNDONE.items():
            if getattr(self, name, False):
                raise SettingsError(f"--{name} {getattr(self, name)}: {reason}: leave it out")
        if self.save_strategy == "best":
            raise SettingsError(
                f"--save_strategy best: {UNDONE['load_best_model_at_end']}: give steps or epoch"
            )
        super().__post_init__()  # type: ignore[no-untyped-call]
        sampling, smoothing = self.train_sampling_strategy, self.label_smoothing_factor
        # Flags of transformers that would do nothing here, or undo something.
        if sampling != "random":
            raise SettingsError(
                f"--train_sampling_strategy {sampling}: samples come in random order, or by length with "
                "--group_by_modality_length True: leave it out"
            )
        if smoothing:
            raise SettingsError(
                f"--label_smoothing_factor {smoothing}: it would replace the model's own loss, with its weights of "
                "lines and actions: leave it out"
            )
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

        zero = zero_settings(self) or {}
        gathers = "stage3_gather_16bit_weights_on_model_save"
        if zero.get("stage") == 3 and not zero.get(gathers):
            raise SettingsError(
                f"--deepspeed {self.deepspeed} is ZeRO-3 without {gathers}, so no checkpoint and no result would hold "
                "the model's weights: set it to true there, as scripts/zero3.json does"
            )


def zero_settings(arguments: transformers.TrainingArguments) -> dict[str, Any] | None:
    """`zero_optimization` of the DeepSpeed configuration; None without DeepSpeed."""
    if not arguments.deepspeed:
        return None
    config = getattr(arguments.hf_deepspeed_config, "config", {})
    found: dict[str, Any] = config.get("zero_optimization", {})
    return found


UNDONE = {
    "enable_jit_checkpoint": "its checkpoint is written at another step on each rank, and nothing can go on from it; a "
    "run that gets SIGTERM, SIGUSR1 or Ctrl-C writes one by itself",
    "load_best_model_at_end": "there is no evaluation data set that could say which checkpoint is the best",
    "ignore_data_skip": "a run that goes on would see the first samples of its epoch twice",
    "auto_find_batch_size": "a batch that changes within a run gives some samples twice and others never",
}
"""Flags of transformers that would undo something."""

OLD_SPELLINGS = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps"}
"""Flags of transformers 4. A share of all steps is given to --warmup_steps as a number below 1."""

_OF_VIDEO = "it belongs to video files, which no VLN data set has: leave it out"
MEANINGLESS = {
    "dataset_use": "data sets have no names here: give --annotation_path and --data_path, or --train_data_root",
    "base_interval": _OF_VIDEO,
    "video_max_frames": _OF_VIDEO,
    "video_min_frames": _OF_VIDEO,
    "video_max_frame_pixels": _OF_VIDEO,
    "video_min_frame_pixels": _OF_VIDEO,
    "shuffle": "the published trainer never reads it: leave it out",
    "overwrite_output_dir": "a directory with checkpoints is resumed; to start anew, give an empty one",
}

Arguments = tuple[ModelArguments, DataArguments, FeatureArguments, TrainingArguments]


class _Parser(HfArgumentParser):
    """Refuses in one sentence."""

    def error(self, message: str) -> Any:
        raise SettingsError(f"{message}; python -m janusvln.train --help lists the flags")


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """The four groups. Raises SettingsError, in one sentence, for what is unknown or contradictory."""
    groups = (ModelArguments, DataArguments, FeatureArguments, TrainingArguments)
    parser = _Parser(groups, allow_abbrev=False)  # type: ignore[arg-type]
    given = [_modern(argument) for argument in argv]
    try:
        parsed = parser.parse_args_into_dataclasses(args=given, look_for_args_file=False)
    except (ValueError, ImportError) as error:
        raise SettingsError(f"the settings cannot be used: {' '.join(str(error).split())}") from error
    model, data, features, training = parsed
    return model, data, features, training


def _modern(argument: str) -> str:
    """An argument in today's spelling. Raises SettingsError for one that means nothing here."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    if name in MEANINGLESS:
        raise SettingsError(f"--{name}: {MEANINGLESS[name]}")
    return f"--{OLD_SPELLINGS.get(name, name)}{equals}{value}"

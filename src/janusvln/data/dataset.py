"""Training samples by number: annotation in, tokens, pixels and a feature request out."""

from __future__ import annotations

import copy
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig

from janusvln.data.dialogue import UnfitSampleError, check_dialogue, read_dialogue
from janusvln.data.images import QwenPixels, load_frames, request_feature
from janusvln.data.tokens import ChatEncoder, RopePositions
from vggt_cache import samples
from vggt_cache.errors import DataError, SettingsError, VggtCacheError, errors_as
from vggt_cache.identity import FeatureSpec
from vggt_cache.samples import Sample, SampleIndex, Sources

Item = dict[str, Any]


def flag(default: Any, text: str) -> Any:
    """A field that is also a flag of the trainer, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What the trainer decides about samples. Raises SettingsError for values that are out of range.

    Samples over a limit are refused, never cut: in causal context the list of frames is what a feature is found by.
    """

    model_max_length: int = flag(163840, "tokens of the longest sample; longer ones are refused")
    max_history_images: int = flag(8, "earlier frames that a sample shows beside the current one")
    min_pixels: int | None = flag(None, "of an image given to Qwen; fewer is refused")
    """None, here and below: as in `preprocessor_config.json`."""
    max_pixels: int | None = flag(None, "of an image given to Qwen; more is refused")
    subinstruction_weight: float = flag(1.0, "loss weight of the SUBINSTRUCTION line of structured samples")
    desc2d_weight: float = flag(1.0, "loss weight of the 2D_DESCRIPTION line")
    desc3d_weight: float = flag(1.0, "loss weight of the 3D_DESCRIPTION line")
    action_weight: float = flag(1.0, "loss weight of the ACTION line")

    def __post_init__(self) -> None:
        for name, least in (("model_max_length", 1), ("max_history_images", 0)):
            if getattr(self, name) < least:
                raise SettingsError(f"--{name} is {getattr(self, name)}: give {least} or more")
        for name in ("subinstruction_weight", "desc2d_weight", "desc3d_weight", "action_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingsError(
                    f"--{name} is {value}, which is no weight (negative or not finite): give 0 or more"
                )
        if not any(self.section_weights):
            raise SettingsError(
                "--subinstruction_weight, --desc2d_weight, --desc3d_weight and --action_weight are all 0, so nothing "
                "would be learned: give at least one a value over 0"
            )

    @property
    def section_weights(self) -> tuple[float, float, float, float]:
        """Of the lines SUBINSTRUCTION, 2D_DESCRIPTION, 3D_DESCRIPTION, ACTION."""
        return self.subinstruction_weight, self.desc2d_weight, self.desc3d_weight, self.action_weight


class NavigationDataset(Dataset[Item]):
    """`dataset[i]` is a dict of tensors for one sample, to be joined by a collator:

    input_ids, labels   int64 [L]
    position_ids        int64 [3, L]
    image_grid_thw      int64 [images, 3]   these three only where the sample has images
    image_positions     int64 [image tokens], where they stand in input_ids
    feature_request     FeatureRequest, which carries the frames; `pixels` makes the model's pixel_values of them
    action_label, action_position   int, with `action_head`: class 0..3 or -100; the last token of the prompt
    loss_weights        float32 [L], where a section weight of the options is not 1

    A sample that cannot be used raises DataError with one sentence that names it. No other takes its place: what is
    trained on would then depend on the state of a disk. Safe in workers made by fork and by spawn.
    """

    def __init__(
        self,
        index: SampleIndex,
        tokenizer: Any,
        *,
        model_dir: str,
        spec: FeatureSpec,
        options: DataOptions,
        action_head: bool = False,
    ) -> None:
        """`model_dir`: of Qwen2.5-VL (or its name on the hub). Raises SettingsError where it cannot be used."""
        self.index = index
        self.spec = spec
        self.options = options
        self._action_head = action_head
        self._weighted = any(weight != 1.0 for weight in options.section_weights)
        self.chat = ChatEncoder(tokenizer)
        self._positions = RopePositions(_config(model_dir))
        self.pixels = QwenPixels(model_dir, min_pixels=options.min_pixels, max_pixels=options.max_pixels)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> Item:
        sample = self.index[at]
        try:
            return self._item(at, sample)
        except UnfitSampleError as error:
            raise DataError(f"the sample {sample.source} {error}") from error

    def without(self, numbers: Iterable[int]) -> NavigationDataset:
        """The same data set without these samples; the others move up."""
        dataset = copy.copy(self)
        dataset.index = self.index.without(numbers)
        return dataset

    @property
    def lengths(self) -> array[int]:
        """Estimated tokens of each sample, without reading any: words plus 252 a frame."""
        return self.index.lengths

    def _item(self, at: int, sample: Sample) -> Item:
        dialogue = read_dialogue(sample, self.options.section_weights)
        check_history(sample, self.options.max_history_images)
        check_dialogue(dialogue, len(sample.frames))
        frames = load_frames(sample, self.spec.preprocessing)
        grids = [self.pixels.grid(frame.pixels) for frame in frames]
        tokens = self.chat.encode(dialogue, [self.pixels.image_tokens(grid) for grid in grids])
        self.check_length(len(tokens.input_ids), len(frames))
        input_ids = torch.tensor(tokens.input_ids)
        thw = torch.tensor([(1, h, w) for h, w in grids]) if grids else None
        item: Item = {
            "input_ids": input_ids,
            "labels": torch.tensor(tokens.labels),
            "position_ids": self._positions(input_ids, thw),
        }
        if self._action_head:
            item["action_label"], item["action_position"] = dialogue.action, tokens.answer_start - 1
        if self._weighted:
            item["loss_weights"] = torch.tensor(tokens.weights, dtype=torch.float32)
        if thw is not None:
            item["image_grid_thw"] = thw
            item["image_positions"] = (input_ids == self.chat.image_token).nonzero()[:, 0]
            item["feature_request"] = request_feature(at, frames, self.spec)
        return item

    def check_length(self, length: int, frames: int) -> None:
        """Raises UnfitSampleError."""
        limit = self.options.model_max_length
        if length > limit:
            raise UnfitSampleError(
                f"has {length} tokens with its {frames} frames, over --model_max_length {limit}, and cutting it would "
                "cut images or the answer: raise --model_max_length, or take fewer or smaller frames"
            )


def check_history(sample: Sample, limit: int) -> None:
    """Raises UnfitSampleError where a sample has more than `limit` frames before its current view."""
    earlier = len(sample.frames) - 1
    if earlier > limit:
        raise UnfitSampleError(
            f"has {earlier} earlier frames, over --max_history_images {limit}; none is left out silently, because "
            f"features belong to whole lists of frames: give --max_history_images {earlier}, or shorter lists"
        )


def _config(model_dir: str) -> Any:
    fault = f"{model_dir} has no config.json that can be read"
    remedy = ": give the directory of a Qwen2.5-VL model"
    with errors_as(SettingsError, fault, remedy, OSError, ValueError):
        config = AutoConfig.from_pretrained(model_dir)
    if getattr(config, "vision_config", None) is None or getattr(config, "image_token_id", None) is None:
        raise SettingsError(f"{model_dir} holds a {config.model_type} and no Qwen2.5-VL model: give one")
    if quantised := getattr(config, "quantization_config", None):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise SettingsError(
            f"{model_dir} holds weights quantised by {method}, which cannot be trained: give the model in bfloat16 or "
            "float32, as Qwen publishes it under the name without AWQ or GPTQ"
        )
    return config


def sources_of(train_data_root: str | None, annotation_path: str | None, data_path: str | None) -> Sources:
    """A data root, or annotation files with the folders of their images. Raises DataError."""
    try:
        return samples.sources_of(train_data_root, annotation_path, data_path)
    except DataError as error:  # the reader is precompute's too, where the flag has another name
        raise DataError(str(error).replace("--data_root", "--train_data_root")) from error


def sentence_of(error: VggtCacheError) -> str:
    """The sentence of an error that may have come through a DataLoader.

    torch raises an error of a worker anew, of the same class, with the worker's traceback as its message; the
    sentence then stands behind the last name of that class. Other errors have their own text.
    """
    text = str(error)
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    _, found, sentence = text.rpartition(f"\n{name}: ")
    return sentence.strip() if found and text.startswith("Caught ") else text

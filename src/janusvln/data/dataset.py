"""Training samples by number: annotation in, tokens, pixels and a feature request out."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import AutoConfig

from janusvln.data.chat import ChatEncoder, Tokens
from janusvln.data.conversations import read_conversation
from janusvln.data.errors import UnfitSampleError
from janusvln.data.frames import load_frames, request_feature
from janusvln.data.options import DataOptions
from janusvln.data.pixels import QwenPixels
from janusvln.data.positions import RopePositions
from janusvln.data.structured import read_step, read_structured
from janusvln.data.turns import Dialogue, check_dialogue
from vggt_cache.errors import DataError, SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.samples import Sample, SampleIndex

Item = dict[str, Any]


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
        spec: FeatureSpec,
        options: DataOptions,
    ) -> None:
        """Raises SettingsError for a model directory that cannot be used."""
        self.index = index
        self.spec = spec
        self.options = options
        self._chat = ChatEncoder(tokenizer)
        self._positions = RopePositions(_config(options.model_dir))
        self.pixels = QwenPixels.read(
            options.model_dir, min_pixels=options.min_pixels, max_pixels=options.max_pixels
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, at: int) -> Item:
        sample = self.index[at]
        try:
            return self._item(at, sample)
        except UnfitSampleError as error:
            raise DataError(f"the sample {sample.source} {error}") from error

    @property
    def lengths(self) -> array[int]:
        """Estimated tokens of each sample, without reading any: words plus 252 a frame."""
        return self.index.lengths

    def _item(self, at: int, sample: Sample) -> Item:
        dialogue = self._dialogue(sample)
        self._check_history(sample)
        check_dialogue(dialogue, len(sample.frames))
        frames = load_frames(sample, self.spec.preprocessing)
        grids = [self.pixels.grid(frame.pixels) for frame in frames]
        tokens = self._chat.encode(dialogue, [self.pixels.image_tokens(grid) for grid in grids])
        self._check_length(len(tokens.input_ids), len(frames))
        thw = torch.tensor([(1, h, w) for h, w in grids]) if grids else None
        item = self._text(tokens, dialogue, thw)
        if thw is not None:
            item["image_grid_thw"] = thw
            item["image_positions"] = (item["input_ids"] == self._chat.image_token).nonzero()[:, 0]
            item["feature_request"] = request_feature(at, frames, self.spec)
        return item

    def _dialogue(self, sample: Sample) -> Dialogue:
        if sample.layout == "conversation":
            return read_conversation(sample.record)
        read = read_step if sample.layout == "episode" else read_structured
        return read(sample, self.options.section_weights)

    def _text(self, tokens: Tokens, dialogue: Dialogue, grid_thw: torch.Tensor | None) -> Item:
        input_ids = torch.tensor(tokens.input_ids)
        item: Item = {
            "input_ids": input_ids,
            "labels": torch.tensor(tokens.labels),
            "position_ids": self._positions(input_ids, grid_thw),
        }
        if self.options.action_head:
            item["action_label"], item["action_position"] = dialogue.action, tokens.answer_start - 1
        if self.options.weighted:
            item["loss_weights"] = torch.tensor(tokens.weights, dtype=torch.float32)
        return item

    def _check_history(self, sample: Sample) -> None:
        earlier, limit = len(sample.frames) - 1, self.options.max_history_images
        if earlier > limit:
            raise UnfitSampleError(
                f"has {earlier} earlier frames, over --max_history_images {limit}; none is left out silently, because "
                f"features belong to whole lists of frames: give --max_history_images {earlier}, or shorter lists"
            )

    def _check_length(self, length: int, frames: int) -> None:
        limit = self.options.model_max_length
        if length > limit:
            raise UnfitSampleError(
                f"has {length} tokens with its {frames} frames, over --model_max_length {limit}, and cutting it would "
                "cut images or the answer: raise --model_max_length, or take fewer or smaller frames"
            )


def _config(model_dir: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{model_dir} has no config.json that can be read ({' '.join(str(error).split())[:200]}): give the "
            "directory of a Qwen2.5-VL model"
        ) from error
    if getattr(config, "vision_config", None) is None or getattr(config, "image_token_id", None) is None:
        raise SettingsError(f"{model_dir} holds a {config.model_type} and no Qwen2.5-VL model: give one")
    return config

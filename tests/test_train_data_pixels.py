"""Qwen's pixels are its own processor's, of the frame that VGGT sees; position ids are worked out by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.data.dialogue import UnfitSampleError
from janusvln.data.images import Pixels, QwenPixels
from janusvln.data.tokens import RopePositions
from janusvln.demo.tiny_qwen import TOKEN_IDS
from train_data_kit import tiny_qwen
from vggt_cache.errors import SettingsError


def random_frame(rows: int, columns: int, seed: int = 0) -> Pixels:
    shape = rows * 14, columns * 14, 3
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def processed(frame: Pixels, model_dir: Path) -> tuple[torch.Tensor, torch.Tensor]:
    processor = Qwen2VLImageProcessorPil.from_pretrained(model_dir)
    made = processor(frame, input_data_format="channels_last", return_tensors="pt")
    return made["pixel_values"], made["image_grid_thw"]


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9))
def test_pixel_values_are_the_processors_own_bit_for_bit(rows: int, columns: int) -> None:
    frame = random_frame(rows, columns, seed=rows * 10 + columns)
    cut = frame[: rows // 2 * 28, : columns // 2 * 28]
    expected, grid = processed(cut, tiny_qwen())
    pixels = QwenPixels(str(tiny_qwen()))
    assert torch.equal(pixels.values(torch.from_numpy(frame)[None]), expected)
    assert (1, *pixels.grid(frame)) == tuple(grid[0].tolist())
    assert pixels.image_tokens(pixels.grid(frame)) * 4 == len(expected)


def test_mean_and_std_are_those_of_the_directory(tmp_path: Path) -> None:
    directory = tmp_path / "other"
    shutil.copytree(tiny_qwen(), directory)
    path = directory / "preprocessor_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "image_mean": [0, 0.5, 1], "image_std": [1, 2, 3]})
    )
    frame = random_frame(2, 4)
    values = QwenPixels(str(directory)).values(torch.from_numpy(frame)[None])
    assert torch.equal(values, processed(frame, directory)[0])
    assert values[0, 0].item() == pytest.approx(frame[0, 0, 0] / 255, abs=1e-6)


def test_frames_stand_one_after_the_other() -> None:
    pixels = QwenPixels(str(tiny_qwen()))
    frames = torch.stack([torch.from_numpy(random_frame(3, 4, seed)) for seed in (1, 2, 1)])
    together = pixels.values(frames)
    assert torch.equal(together, torch.cat([pixels.values(frames[at : at + 1]) for at in range(3)]))
    assert together.shape == (3 * 8, 3 * 2 * 14 * 14)
    assert together.dtype == torch.float32


def test_a_table_on_a_device_leaves_the_one_that_workers_receive_where_it_is() -> None:
    pixels = QwenPixels(str(tiny_qwen()))
    frames = torch.from_numpy(random_frame(2, 4))[None]
    elsewhere = pixels.on(torch.device("meta"))
    assert elsewhere.values(frames.to("meta")).device.type == "meta"
    pixels.values(frames.to("meta"))
    assert torch.equal(pixels.values(frames), QwenPixels(str(tiny_qwen())).values(frames))


@pytest.mark.parametrize(
    ("limits", "size", "reason"),
    [
        ({"max_pixels": 8 * 196 - 1}, (2, 4), "have 1568 pixels, outside the model's 784 to 1567"),
        ({"min_pixels": 8 * 196 + 1}, (3, 5), "have 1568 pixels, outside the model's 1569 to 12845056"),
        ({}, (1, 5), "a grid of 1x5 patches is too small"),
    ],
)
def test_frames_that_the_processor_would_resize_are_refused(
    limits: dict[str, int], size: tuple[int, int], reason: str
) -> None:
    pixels = QwenPixels(str(tiny_qwen()), **limits)
    with pytest.raises(UnfitSampleError, match=reason):
        pixels.grid(random_frame(*size))


def test_limits_include_their_bounds() -> None:
    pixels = QwenPixels(str(tiny_qwen()), min_pixels=8 * 196, max_pixels=8 * 196)
    assert pixels.grid(random_frame(3, 5)) == (2, 4)


def test_directories_and_limits_that_make_no_sense_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"has no preprocessor_config\.json that can be read") as refusal:
        QwenPixels(str(tmp_path))
    assert "\n" not in str(refusal.value)
    with pytest.raises(SettingsError, match="min_pixels is 9 and max_pixels 8"):
        QwenPixels(str(tiny_qwen()), min_pixels=9, max_pixels=8)
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_qwen())
    processor.patch_size = 16
    processor.save_pretrained(tmp_path)
    with pytest.raises(SettingsError, match="patches of 16 pixels, VGGT on 14"):
        QwenPixels(str(tmp_path))


# ---------------------------------------------------------------- position ids


def test_positions_of_two_images_between_texts_are_those_worked_out_by_hand() -> None:
    pad, letter = TOKEN_IDS["<|image_pad|>"], 5
    ids = torch.tensor([letter] * 3 + [pad] * 6 + [letter] * 2 + [pad] * 2 + [letter])
    grids = torch.tensor([[1, 4, 6], [1, 2, 4]])  # 2 x 3 and 1 x 2 tokens
    positions = RopePositions(AutoConfig.from_pretrained(tiny_qwen()))(ids, grids)
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8, 8, 10],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8, 8, 10],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10],
    ]


def test_positions_of_text_alone_count_up() -> None:
    positions = RopePositions(AutoConfig.from_pretrained(tiny_qwen()))(torch.tensor([5, 6, 7]), None)
    assert positions.tolist() == [[0, 1, 2]] * 3

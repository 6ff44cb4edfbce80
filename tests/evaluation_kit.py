"""A tiny model as training leaves it, and frames to show it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoTokenizer

from janusvln.demo.tiny_qwen import write_tiny_qwen
from janusvln.features.resolve import WantedFeatures, live_spec, summary
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN as JanusVLN

PROMPT = "Seen before:{history}\nSeen now:<image>\nTask: {instruction}\nWhat next?"
SIZE = (48, 64)
"""Height and width of the frames; at image_size 56 they become 42 x 56 pixels, 3 x 4 patches."""


def write_trained(
    root: Path, vggt: Path, *, context: str = "causal", tied: bool = False, layer: int = -2, **fields: Any
) -> Path:
    """The directory of a model whose answers depend on what it sees: its random weights are large."""
    qwen = write_tiny_qwen(root / "qwen")
    torch.manual_seed(1)
    model = JanusVLN.from_pretrained(qwen, spatial_channels=768, **fields)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 0.2)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.get_input_embeddings().weight
    wanted = WantedFeatures(context=context, image_size=56, layer=layer, compute_dtype="float32")
    model.config.feature_spec = summary(live_spec(wanted, str(vggt), "cpu"))
    trained = root / "trained"
    model.save_pretrained(trained)
    AutoTokenizer.from_pretrained(qwen).save_pretrained(trained)
    shutil.copy(qwen / "preprocessor_config.json", trained)
    return trained


def make_frames(count: int, seed: int = 0) -> list[npt.NDArray[np.uint8]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(count)]

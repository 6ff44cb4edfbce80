"""A tiny Qwen2.5-VL directory with the real names: random weights, byte-level tokenizer, all special tokens.

It is loaded by the same code as `Qwen/Qwen2.5-VL-3B-Instruct`. A token is one byte, so it can say anything,
though not shortly. The same seed gives the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from janusvln.model.checkpoints import share

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""As in Qwen2.5-VL; there they begin at 151643, here behind the 256 bytes."""
VOCABULARY = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
TOKEN_IDS = {token: len(VOCABULARY) + index for index, token in enumerate(SPECIAL_TOKENS)}

SPATIAL_HIDDEN_SIZE = 128
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_config() -> Qwen2_5_VLConfig:
    """Two layers of 64 channels on a two-block vision tower of 32."""
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(VOCABULARY) + len(SPECIAL_TOKENS),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": TOKEN_IDS["<|endoftext|>"],
            "eos_token_id": TOKEN_IDS["<|im_end|>"],
            "pad_token_id": TOKEN_IDS["<|endoftext|>"],
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=TOKEN_IDS["<|image_pad|>"],
        video_token_id=TOKEN_IDS["<|video_pad|>"],
        vision_start_token_id=TOKEN_IDS["<|vision_start|>"],
        vision_end_token_id=TOKEN_IDS["<|vision_end|>"],
    )


def write_tiny_qwen(directory: str | Path, *, seed: int = 0) -> Path:
    """Write config, weights (float32), tokenizer and preprocessor settings; returns the directory.

    The configuration asks for a spatial merger that is small too; all else is a plain Qwen2.5-VL's.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(tiny_config())
    model.config.spatial_hidden_size = SPATIAL_HIDDEN_SIZE
    model.save_pretrained(path)
    share(path)
    specials: dict[str, Any] = {
        "eos_token": "<|im_end|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    Qwen2Tokenizer(
        VOCABULARY | TOKEN_IDS, [], **specials, chat_template=CHAT_TEMPLATE, model_max_length=131072
    ).save_pretrained(path)
    Qwen2VLImageProcessorPil(min_pixels=784, max_pixels=12845056).save_pretrained(path)
    return path

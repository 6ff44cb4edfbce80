"""Which attention the model runs with."""

from __future__ import annotations

from transformers.utils.import_utils import is_flash_attn_2_available


def attention_implementation() -> str:
    """`flash_attention_2` where the package flash_attn is installed and there is a GPU for it, else `sdpa`."""
    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"

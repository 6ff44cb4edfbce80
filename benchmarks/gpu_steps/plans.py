"""What the first call of a new shape costs, for which cuDNN's attention makes a plan: milliseconds, first and second.

    attention_<b>x<k>_default, _flash   torch's attention of b branches to k frames, in the layout of the encoder
    encoder_<b>x<k>_<attention>         causal lists that meet there, by the encoder with one pair of blocks, which has
                                        met only single branches before

This step runs twice: as torch is, and with TORCH_CUDNN_SDPA_DEPRIORITIZED=1 (`plans_deprioritised`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional

from bench_encoder import HEIGHT_OF_640x480, random_encoder
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting
from profile_parts import synchronize
from vggt_cache.encoder import Encoder
from vggt_cache.encoder.causal import encode_lists

SHAPES = ((1, 1), (3, 1), (3, 2), (4, 3), (5, 9), (7, 5))
"""(branches, frames seen), each met once only."""


def run(setting: Setting, notes: Notes) -> None:
    for branches, frames in SHAPES[: 3 if setting.dry else None]:
        for kernel in ("default", "flash"):
            with setting.attention(kernel):
                notes.measure(
                    f"attention_{branches}x{frames}_{kernel}", partial(attention, setting, branches, frames)
                )
    encoder = random_encoder(setting.config, setting.device, setting.compute_dtype, layer=0)
    for branches, frames in SHAPES[1 : 3 if setting.dry else None]:
        for kernel in ("default", "cudnn"):
            with setting.attention(kernel):
                notes.measure(
                    f"encoder_{branches}x{frames}_{kernel}",
                    partial(lists_that_meet, setting, encoder, branches, frames),
                )


def first_and_second_ms(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    elapsed_ms = []
    for _ in range(2):
        synchronize(device)
        began_s = time.perf_counter()
        work()
        synchronize(device)
        elapsed_ms.append(1e3 * (time.perf_counter() - began_s))
    return {"first_ms": elapsed_ms[0], "second_ms": elapsed_ms[1]}


def attention(setting: Setting, branches: int, frames: int) -> dict[str, float]:
    width = setting.widths[0]
    tokens = 5 + HEIGHT_OF_640x480[width] * width // 196
    dtype = torch.float32 if setting.dry else torch.bfloat16
    packed = torch.randn(branches, frames * tokens, 3, 16, 64, device=setting.device, dtype=dtype)
    q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    new = q[:, :, -tokens:]
    return first_and_second_ms(lambda: functional.scaled_dot_product_attention(new, k, v), setting.device)


def lists_that_meet(setting: Setting, encoder: Encoder, branches: int, frames: int) -> dict[str, float]:
    """The same earlier frames in all lists, and another last one in each."""
    images = setting.images(setting.widths[0], frames + branches)
    lists = [[*range(frames - 1), frames + branch] for branch in range(branches)]

    def encode(lists: list[list[int]]) -> None:
        for _ in encode_lists(encoder, lists, images.__getitem__, batch_size=branches):
            pass

    encode(lists[:1])
    return first_and_second_ms(lambda: encode(lists), setting.device)

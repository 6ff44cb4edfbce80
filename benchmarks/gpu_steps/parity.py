"""Whether the features are right on this device: against the published code, the CPU, and each other.

goldens_*              the small encoder against what the published code gave: absolute difference in float32, with
                       the caller's TF32 on as well; in bfloat16 the relative one from float32 on the CPU
<width>_*              relative L2 differences of the large encoder: bfloat16 from float32; a frame in a batch from
                       the same alone; lists with shared prefixes from the same frame by frame; in bfloat16 also
                       fused from plain kernels, and attention by cuDNN from flash
one_frame_against_cpu  the large encoder from itself on the CPU in float32
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

import golden_recipe
from bench_causal import one_by_one
from bench_encoder import converted
from gpu_steps.notes import Notes
from gpu_steps.setting import Setting, has_fused_path, plain_path, relative_difference
from vggt_cache.encoder import Encoder, EncoderConfig, expected_shapes
from vggt_cache.encoder.causal import encode_lists
from vggt_cache.identity import PATCH_SIZE

LAYERS = (0, 1, -2, -1)
"""Pairs whose output the golden files hold."""
LISTS = ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 2], [0, 2, 1], [0, 1, 3])


def run(setting: Setting, notes: Notes) -> None:
    small = golden_encoder(setting)
    notes.measure("goldens_float32", lambda: from_goldens(setting, small))
    notes.measure("goldens_float32_beside_tf32", lambda: beside_tf32(setting, small))
    notes.measure("goldens_bfloat16", lambda: bfloat16_from_float32(setting, small))
    wide = setting.encoder("float32")
    narrow = converted(wide, "bfloat16", setting.device)
    for width in setting.widths:
        notes.measure(f"{width}_bfloat16", partial(frame_difference, setting, width, narrow, wide))
        notes.measure(f"{width}_cudnn_against_flash", partial(cudnn_from_flash, setting, width, narrow))
        if has_fused_path(narrow):
            notes.measure(f"{width}_fused_against_plain", partial(fused_from_plain, setting, width, narrow))
        for name, encoder in (("bfloat16", narrow), ("float32", wide)):
            notes.measure(
                f"{width}_{name}_batch_against_alone", partial(batch_from_alone, setting, width, encoder)
            )
            notes.measure(
                f"{width}_{name}_shared_against_alone", partial(shared_from_alone, setting, width, encoder)
            )
    notes.measure("one_frame_against_cpu", lambda: from_cpu(setting, {"float32": wide, "bfloat16": narrow}))


# ---------------------------------------------------------------- the small encoder, the published code


def golden_encoder(setting: Setting) -> Encoder:
    """On the device, in float32, with the weights of the golden files."""
    config = EncoderConfig.from_dict(golden_recipe.SMALL_CONFIG)
    weights = golden_recipe.make_weights(expected_shapes(config))
    weights.pop("patch_embed.mask_token")
    encoder = Encoder(config, layer=range(config.depth), tokens="all")
    encoder.load_state_dict(weights)
    return encoder.to(setting.device)


def from_goldens(setting: Setting, encoder: Encoder) -> float:
    """The largest absolute difference at any stored layer, of single frames, a causal sequence and a joint list."""
    frame, causal = golden_recipe.stored("frame.npz"), golden_recipe.stored("causal.npz")
    cases = sorted({key.rsplit("/", 2)[0] for key in frame if "/L0/" in key})
    differences = []
    for case in cases[: 1 if setting.dry else None]:
        size, seed = case.split("/s")
        width, height = map(int, size.split("x"))
        (pairs,) = outputs(encoder, [golden_recipe.image(int(seed), height, width)])
        differences += [from_layer(frame, f"{case}/L{layer}", pairs[layer % 4]) for layer in LAYERS]
    sequence = [golden_recipe.image(21, 112, 154, number) for number in range(2 if setting.dry else 6)]
    for number, pairs in enumerate(outputs(encoder, sequence)):
        differences += [from_layer(causal, f"f{number}/L{layer}", pairs[layer % 4]) for layer in LAYERS]
    joint = golden_recipe.stored("joint.npz")
    pixels = torch.stack([golden_recipe.image(31, 112, 140, number) for number in range(3)])
    for frame, pairs in enumerate(encoder.joint_features(encoder.patch_tokens(pixels)[None])[0].cpu()):
        differences += [
            from_layer(joint, f"s31_3x112x140/f{frame}/L{layer}", tokens)
            for layer, tokens in enumerate(pairs)
        ]
    return max(differences)


def outputs(encoder: Encoder, images: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """All tokens after each pair [pairs, n, 2C], of each frame of a causal sequence."""
    grid = images[0].shape[0] // PATCH_SIZE, images[0].shape[1] // PATCH_SIZE
    history = encoder.new_history(grid, rows=1, frames=len(images))
    for number, image in enumerate(images):
        tokens = encoder.patch_tokens(image[None])
        features = encoder.extend(tokens, history, [0], number, want_feature=[True])
        assert features is not None
        yield features[0].cpu()


def from_layer(golden: Mapping[str, Any], key: str, tokens: torch.Tensor) -> float:
    return golden_recipe.largest_difference(golden, key, tokens, special=5)


def beside_tf32(setting: Setting, encoder: Encoder) -> float:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return from_goldens(setting, encoder)
    finally:
        torch.set_float32_matmul_precision(before)


def bfloat16_from_float32(setting: Setting, encoder: Encoder) -> float:
    image = golden_recipe.image(3, 112, 154)[None]
    reference = converted(encoder, "float32", "cpu").frame_features(image)
    found = converted(encoder, "bfloat16", setting.device).frame_features(image)
    return relative_difference(found, reference)


# ---------------------------------------------------------------- the large encoder


def frame_difference(setting: Setting, width: int, encoder: Encoder, reference: Encoder) -> float:
    image = setting.images(width, 1)
    return relative_difference(encoder.frame_features(image), reference.frame_features(image))


def fused_from_plain(setting: Setting, width: int, encoder: Encoder) -> float:
    images = setting.images(width, 2)
    with plain_path():
        plain = encoder.frame_features(images)
    return relative_difference(encoder.frame_features(images), plain)


def cudnn_from_flash(setting: Setting, width: int, encoder: Encoder) -> float:
    images = setting.images(width, 2)
    with setting.attention("flash"):
        flash = encoder.frame_features(images)
    with setting.attention("cudnn"):
        return relative_difference(encoder.frame_features(images), flash)


def batch_from_alone(setting: Setting, width: int, encoder: Encoder) -> float:
    images = setting.images(width, 3 if setting.dry else 16)
    batch = encoder.frame_features(images)
    return max(
        relative_difference(batch[at], encoder.frame_features(images[at : at + 1])[0])
        for at in (0, len(images) - 1)
    )


def shared_from_alone(setting: Setting, width: int, encoder: Encoder) -> float:
    images = setting.images(width, 9)
    lists = LISTS[1:] if setting.dry else LISTS
    shared = dict(encode_lists(encoder, lists, images.__getitem__, batch_size=4))
    return max(
        relative_difference(shared[at], one_by_one(encoder, frames, images))
        for at, frames in enumerate(lists)
    )


def from_cpu(setting: Setting, encoders: dict[str, Encoder]) -> dict[str, float]:
    image = setting.images(setting.widths[0], 1)
    reference = converted(encoders["float32"], "float32", "cpu").frame_features(image)
    return {
        name: relative_difference(encoder.frame_features(image), reference)
        for name, encoder in encoders.items()
    }

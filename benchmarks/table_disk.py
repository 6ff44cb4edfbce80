"""What a cache takes on disk, by arithmetic, and what a smaller disk can do instead. Needs nothing but Python.

A feature is a grid of `h x w` patches with 2048 values each. `causal` context needs one for each sample, `frame`
context one for each image; in the data sets below every sample is one step with an image of its own, so both need the
same.
"""

from __future__ import annotations

from typing import Any

PATCH_PIXELS = 14
CHANNELS = 2048
FRAME_PIXELS = (640, 480)
DATA_SETS = {"R2R-CE": 612_000, "R2R + RxR": 2_000_000}
"""Samples of each: about as many as the published training data have."""
WIDTHS = (518, 644)

ENGLISH = {
    "head": "| data, 640x480 frames | `--image_size` | a feature | bfloat16 | `--codec lossless` | "
    "`--feature_dtype int8` |",
    "data": "{name}, {samples} samples",
    "less": (
        "With less disk than that, in this order:",
        "",
        "1. `--codec lossless`: {lossless} of the bytes, the same bits.",
        "2. `--feature_dtype int8`: {int8} of the bytes. Features are {error} % off, and the loss after "
        "{steps} training steps was {loss} % off.",
        "3. A part of the features (`--max_samples N`): training computes what is missing, in every step that "
        "needs it.",
        "4. No cache: VGGT runs live, by this project's encoder and outside the DeepSpeed engine. That is the second "
        "best: in one run a step took {live} s this way, {reference} s as published, {cached} s from the cache "
        "({size} models, one process, {machine}). Under ZeRO-3 the published way gathers VGGT's weights for each frame "
        "besides, which is not in these figures.",
    ),
}
CHINESE = {
    "head": "| 数据，640x480 的帧 | `--image_size` | 单个特征 | bfloat16 | `--codec lossless` | "
    "`--feature_dtype int8` |",
    "data": "{name}，{samples} 个样本",
    "less": (
        "磁盘不够时，按下面的顺序考虑：",
        "",
        "1. `--codec lossless`：体积为原来的 {lossless}，数值逐位不变。",
        "2. `--feature_dtype int8`：体积为原来的 {int8}。特征误差 {error} %，训练 {steps} 步后损失相差 {loss} %。",
        "3. 只缓存一部分特征（`--max_samples N`）：缺的部分在训练中用到时现算。",
        "4. 完全不用缓存：由本项目的编码器在 DeepSpeed 引擎之外实时运行 VGGT，这是次优方案：同一次运行中，"
        "这种方式每步 {live} s，原始做法 {reference} s，读缓存 {cached} s（{size} 模型，单进程，{machine}）。"
        "在 ZeRO-3 下，原始做法还要为每一帧收集一遍 VGGT 的权重，这部分没有计入。",
    ),
}
TEXTS = {"en": ENGLISH, "zh": CHINESE}


def grid(width: int) -> tuple[int, int]:
    """(h, w) in patches of a frame that is resized to this width, rounded as VGGT's loader does."""
    height = FRAME_PIXELS[1] * (width / FRAME_PIXELS[0])
    return round(height / PATCH_PIXELS), width // PATCH_PIXELS


def feature_bytes(width: int) -> int:
    """Of one feature in bfloat16."""
    h, w = grid(width)
    return h * w * CHANNELS * 2


def int8_bytes(width: int) -> int:
    """Of one feature as levels (int8), scales (float32 a token) and normalisers (bfloat16 a channel)."""
    h, w = grid(width)
    return h * w * CHANNELS + 4 * h * w + 2 * CHANNELS


def lines(results: dict[str, dict[str, Any]], language: str) -> list[str]:
    """The table, then what to do with less; `results`: the newest result of each theme."""
    text, figures = TEXTS[language], {theme: result["figures"] for theme, result in results.items()}
    codec = figures["codec"][results["codec"]["configuration"]["sizes"][0]]
    table = [text["head"], "|---|---|---|---|---|---|"]
    for name, samples in DATA_SETS.items():
        data = text["data"].format(name=name, samples=f"{samples:,}")
        for width in WIDTHS:
            one = feature_bytes(width)
            sizes = (one, one * codec["lossless_ratio"], int8_bytes(width))
            cells = " | ".join(f"{samples * size / 1e12:.1f} TB" for size in sizes)
            table.append(f"| {data} | {width} | {one / 1e6:.1f} MB | {cells} |")
    step = results["step"]
    machine = step["machine"]
    values = {
        **{way: f"{seconds:.3g}" for way, seconds in step["figures"]["seconds_per_step"].items()},
        "size": step["configuration"]["size"],
        "machine": machine["gpu"] or f"{machine['cores']} x {machine['cpu']}",
        "lossless": f"{codec['lossless_ratio']:.3f}",
        "int8": f"{codec['int8_ratio']:.3f}",
        "error": f"{100 * codec['int8_relative_error']:.2f}",
        "steps": results["loss"]["configuration"]["steps"],
        "loss": f"{100 * figures['loss']['int8']['end_loss_relative_difference']:.3f}",
    }
    return [*table, "", *(line.format(**values) for line in text["less"])]

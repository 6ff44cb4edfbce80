"""The documents' tables of figures, made from the newest result of each theme and machine.

`python benchmarks/table.py` writes them between the marks in the READMEs and the guide; with `--check` it only says
whether they are as they should be (exit code 1 if not). Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: made by benchmarks/table.py -->", "<!-- end of figures -->"

TEXTS = {
    "README.md": {
        "head": "| what | measured | limit or peer beside it | machine |",
        "precompute": "precompute end to end, {frames} frames, {image_size} wide",
        "precompute_limit": "{limit} s: the encoder alone on the same frames, already decoded",
        "precompute_value": "{seconds} s, **{ratio} x**",
        "causal": "causal features of a {samples}-step episode",
        "causal_value": "{seconds} s, **{ratio} x**; {shared} passes, {tower} through the patch tower",
        "causal_limit": "{limit} s, {passes} passes: every sample frame by frame; ratio of FLOPs {flops}",
        "planning": "a second, unchanged run, {samples} samples, {images} images",
        "planning_value": "**{seconds} s**, {memory} MB, {opened} images opened",
        "planning_limit": "{parse} s to parse the JSON, {stat} s to stat the images",
        "reading": "batches of {batch_size} features of {record} MB to the training loop, {threads} threads",
        "reading_value": "{delivery} GB/s, **{over}** of the limit; one `get(out=)` {get_into_buffer} GB/s, **{into}**",
        "reading_limit": "{pread_threads_checksum} GB/s pread and checksum, {threads} threads; pread alone {pread_1}; "
        "a DataLoader of {threads} workers {dataloader} (**{times} x**)",
        "startup": "from nothing to the first step, {samples} samples, all in the cache",
        "startup_value": "{start} s, of which **{data} s** are for the data",
        "startup_limit": "{parse} s to parse the JSON",
        "step": "training step from the cache ({size} models, {tokens} tokens, 9 frames)",
        "step_value": "{cached} s, **{over} x** the step with its features in memory",
        "step_limit": "{resident} s: features in memory; live {live} s, as published {reference} s (**{speedup} x**)",
        "encoder": "encoder ({size}, {dtype}), {context}, {width} wide",
        "encoder_value": "{frames} passes/s, **{share} %** of the peak",
        "encoder_limit": "{peak} TFLOP/s: the largest matrix product",
    },
    "README.zh-CN.md": {
        "head": "| 内容 | 实测 | 旁边的极限或对照 | 机器 |",
        "precompute": "预计算全程，{frames} 帧，宽 {image_size}",
        "precompute_limit": "{limit} s：同样的帧已解码，只跑编码器",
        "precompute_value": "{seconds} s，**{ratio} 倍**",
        "causal": "{samples} 步 episode 的因果特征",
        "causal_value": "{seconds} s，**{ratio} 倍**；{shared} 次前向，patch tower {tower} 次",
        "causal_limit": "{limit} s，{passes} 次前向：每个样本逐帧计算；FLOPs 之比 {flops}",
        "planning": "第二次、未改动的运行，{samples} 个样本，{images} 张图像",
        "planning_value": "**{seconds} s**，{memory} MB，打开 {opened} 张图像",
        "planning_limit": "解析 JSON {parse} s，stat 图像 {stat} s",
        "reading": "把每批 {batch_size} 个 {record} MB 的特征送到训练循环，{threads} 线程",
        "reading_value": "{delivery} GB/s，极限的 **{over}**；单次 `get(out=)` {get_into_buffer} GB/s，**{into}**",
        "reading_limit": "{threads} 线程 pread 加校验 {pread_threads_checksum} GB/s；单线程 pread {pread_1}；"
        "{threads} 个 worker 的 DataLoader {dataloader}（**{times} 倍**）",
        "startup": "从启动到第一步，{samples} 个样本，全部在缓存中",
        "startup_value": "{start} s，其中数据占 **{data} s**",
        "startup_limit": "解析 JSON {parse} s",
        "step": "用缓存训练一步（{size} 模型，{tokens} 个 token，9 帧）",
        "step_value": "{cached} s，是特征已在内存时的 **{over} 倍**",
        "step_limit": "特征已在内存 {resident} s；实时计算 {live} s，原始方式 {reference} s（**{speedup} 倍**）",
        "encoder": "编码器（{size}，{dtype}），{context}，宽 {width}",
        "encoder_value": "{frames} 次前向/s，峰值的 **{share} %**",
        "encoder_limit": "{peak} TFLOP/s：最大的矩阵乘法",
    },
}


TEXTS["docs/guide.md"] = TEXTS["README.md"]
ONLY = {"docs/guide.md": ("step",)}
"""Themes of a document that does not show all of them."""


def newest_results() -> list[dict[str, Any]]:
    """The last result of each theme and machine, by date."""
    found = {}
    for path in sorted(
        ROOT.glob("benchmarks/results/*_*_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]
    ):
        found[path.stem.rsplit("_", 1)[0]] = json.loads(path.read_text())
    return [found[name] for name in sorted(found)]


def rows(result: dict[str, Any], text: dict[str, str]) -> Iterator[str]:
    theme, figures, settings = result["theme"], result["figures"], result["configuration"]
    machine = result["machine"]["gpu"] or f"{result['machine']['cores']} x {result['machine']['cpu']}"
    for values in _values(theme, figures, settings):
        cells = (text[f"{theme}{part}"].format(**values) for part in ("", "_value", "_limit"))
        yield f"| {' | '.join(cells)} | {machine} |"


def _values(theme: str, figures: dict[str, Any], settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if theme == "precompute":
        yield {
            **settings,
            "seconds": f"{figures['precompute_s']:.1f}",
            "ratio": f"{figures['ratio']:.2f}",
            "limit": f"{figures['encoder_alone_s']:.1f}",
        }
    elif theme == "causal":
        yield {
            "samples": figures["samples"],
            "seconds": f"{figures['shared_s']:.1f}",
            "ratio": f"{figures['ratio']:.2f}",
            "shared": figures["frame_passes_shared"],
            "tower": figures["tower_passes_shared"],
            "limit": f"{figures['published_s']:.1f}",
            "passes": figures["frame_passes_published"],
            "flops": f"{figures['ratio_of_flops']:.2f}",
        }
    elif theme == "planning":
        run, limits = figures["unchanged_run"], figures["limits"]
        yield {
            **settings,
            "seconds": f"{run['elapsed_s']:.1f}",
            "memory": round(run["peak_memory_bytes"] / 1e6),
            "opened": run["opened"]["images"],
            "parse": f"{limits['json_parse_s']:.2f}",
            "stat": f"{limits['stat_s']:.2f}",
        }
    elif theme == "reading":
        speeds = figures["bytes_per_s"]
        yield {
            "record": f"{figures['record_bytes'] / 1e6:.1f}",
            **settings,
            **{way: f"{speed / 1e9:.1f}" for way, speed in speeds.items()},
            "into": f"{figures['get_into_buffer_over_limit']:.2f}",
            "over": f"{figures['delivery_over_limit_with_checksum']:.2f}",
            "times": f"{figures['delivery_over_dataloader']:.0f}",
        }
    elif theme == "startup":
        yield {
            **settings,
            "data": f"{figures['seconds_for_the_data']:.1f}",
            "start": f"{figures['seconds_to_first_step']:.1f}",
            "parse": f"{figures['json_parse_s']:.1f}",
        }
    elif theme == "step":
        seconds = figures["seconds_per_step"]
        yield {
            "size": settings["size"],
            "tokens": figures["tokens"],
            **{way: f"{seconds[way]:.3f}" for way in seconds},
            "over": f"{figures['cached_over_resident']:.3f}",
            "speedup": f"{figures['reference_over_cached']:.1f}",
        }
    elif theme == "encoder":
        for width in settings["widths"]:
            for context, speed in (("frame", "frames_per_s"), ("causal", "frame_passes_per_s")):
                one = figures[f"{context}_{width}"]
                yield {
                    "size": settings["size"],
                    "dtype": settings["compute_dtype"],
                    "context": context,
                    "width": width,
                    "frames": f"{one[speed]:.2f}",
                    "share": f"{100 * one['share_of_matrix_peak']:.0f}",
                    "peak": f"{figures['matrix_peak_flop_per_s'] / 1e12:.2f}",
                }


def with_table(name: str) -> str:
    """The README with its table as the results say."""
    content = (ROOT / name).read_text(encoding="utf-8")
    before, rest = content.split(BEGIN)
    lines = [TEXTS[name]["head"], "|---|---|---|---|"]
    shown = [result for result in newest_results() if result["theme"] in ONLY.get(name, (result["theme"],))]
    lines += [row for result in shown for row in rows(result, TEXTS[name])]
    return before + BEGIN + "\n" + "\n".join(lines) + "\n" + END + rest.split(END)[1]


def main() -> int:
    stale = [name for name in TEXTS if with_table(name) != (ROOT / name).read_text(encoding="utf-8")]
    if "--check" not in sys.argv:
        for name in stale:
            (ROOT / name).write_text(with_table(name), encoding="utf-8")
        return 0
    for name in stale:
        print(
            f"[ERROR] the figures in {name} are not those of benchmarks/results: run python benchmarks/table.py"
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""Precompute end to end against the encoder alone.

Theory. Precompute cannot be faster than the encoder on pixels that lie on its device already: that is the limit.
Reading, decoding, checking and writing go on beside it, in other processes and threads; what is left over is their
share of the same cores, and the start (scanning, loading the model, starting workers).

Both run in this process, on the same frames, with the same batches: first the encoder alone on decoded pixels, then the
whole of precompute from the command line's function, then the encoder alone again; the mean of the two is the limit.
`--frames` should be large enough that the start does not dominate; what holds without the start is the rate at which
features are written from the first batch to the last (`of_encoder_alone`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import record
from photographs import write_frames
from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings, choose_compute_dtype


class Listener(Reporter):
    """Prints what a run says, and keeps it, and when its features were written."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.written_at_s: list[float] = []
        """One entry a feature."""

    def info(self, text: str) -> None:
        self.said.append(text)
        super().info(text)

    def bar(self, total: int, unit: str) -> tqdm[Any]:
        bar = super().bar(total, unit)
        update = bar.update

        def noted(count: float | None = 1) -> bool | None:
            self.written_at_s += [time.perf_counter()] * int(count or 0)
            return update(count)

        bar.update = noted  # type: ignore[method-assign]
        return bar

    def features_per_s(self, batch_size: int) -> float | None:
        """Of all that came after the first batch, which also waits for the start."""
        times = self.written_at_s[batch_size - 1 :]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None


def encoder_alone_s(encoder: Encoder, pixels: list[torch.Tensor], batch_size: int) -> float:
    began_s = time.perf_counter()
    for start in range(0, len(pixels), batch_size):
        encoder.frame_features(torch.stack(pixels[start : start + batch_size]).to(encoder.device))
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


def end_to_end(
    settings: PrecomputeSettings, encoder: Encoder, paths: Sequence[Path], alone: int
) -> dict[str, Any]:
    """Precompute of the frames `paths`, beside `encoder` on the first `alone` of them. Removes the cache."""
    size = settings.batch_size
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        decoded = pool.map(lambda path: decode_frame(read_frame(path), settings.preprocessing), paths[:alone])
        pixels = [torch.from_numpy(one).to(encoder.device) for one in decoded]
    encoder_alone_s(encoder, pixels[: 2 * size], size)

    before_s = encoder_alone_s(encoder, pixels, size)
    listener = Listener()
    began_s = time.perf_counter()
    try:
        code = precompute(settings, listener)
    finally:
        shutil.rmtree(settings.cache_dir, ignore_errors=True)
    if code != 0:
        raise RuntimeError(f"precompute ended with exit code {code}: {listener.said[-3:]}")
    precompute_s = time.perf_counter() - began_s
    after_s = encoder_alone_s(encoder, pixels, size)

    alone_per_s = 2 * len(pixels) / (before_s + after_s)
    limit_s, steady = len(paths) / alone_per_s, listener.features_per_s(size)
    figures = {
        "frames": len(paths),
        "mean_png_bytes": round(sum(path.stat().st_size for path in paths) / len(paths)),
        "encoder_alone_s": round(limit_s, 3),
        "encoder_alone_before_and_after_s": [round(before_s, 3), round(after_s, 3)],
        "precompute_s": round(precompute_s, 3),
        "ratio": round(precompute_s / limit_s, 4),
        "frames_per_s": round(len(paths) / precompute_s, 3),
        "checked": [text for text in listener.said if text.startswith(("Verification", "Recomputed"))],
    }
    if steady is not None:
        figures["written_per_s"] = round(steady, 3)
        figures["of_encoder_alone"] = round(steady / alone_per_s, 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--image_size", type=int, default=518)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--vggt_model_path", help="a checkpoint; default: the small one of the demo")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    folder = Path(tempfile.mkdtemp())
    try:
        figures = measure(folder, arguments)
    finally:
        shutil.rmtree(folder)
    record.write("precompute", arguments.device, vars(arguments), figures)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    root = folder / "data"
    root.mkdir()
    paths = write_frames(root, arguments.frames)
    settings = PrecomputeSettings(
        data_root=str(root),
        cache_dir=str(folder / "cache"),
        vggt_model_path=arguments.vggt_model_path or str(write_checkpoint(folder / "model")),
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
    )
    encoder = Checkpoint.open(settings.vggt_model_path).load(
        device=settings.device, compute_dtype=choose_compute_dtype("auto", settings.device)
    )
    return end_to_end(settings, encoder, paths, alone=len(paths))


if __name__ == "__main__":
    main()

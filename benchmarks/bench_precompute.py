"""Precompute end to end against the encoder alone.

Theory. Precompute cannot be faster than the encoder on pixels that lie in memory already: that is the limit. Reading,
decoding, checking and writing go on beside it, in other processes and threads; what is left over is their share of the
same cores, and the start (scanning, loading the model, starting workers).

Both run in this process, on the same frames, with the same batches: first the encoder alone on decoded pixels, then the
whole of precompute from the command line's function, then the encoder alone again; the mean of the two is the limit.
`--frames` should be large enough that the start does not dominate.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import record
from vggt_cache.demo.checkpoint import write_checkpoint
from vggt_cache.encoder import Checkpoint, Encoder
from vggt_cache.frames import decode_frame, read_frame
from vggt_cache.precompute.run import precompute
from vggt_cache.precompute.settings import PrecomputeSettings, choose_compute_dtype


def write_frames(root: Path, count: int) -> None:
    """Noisy 640x480 PNG of 400 to 500 KB, as large as real photographs, and one annotation file that names them."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[0:480, 0:640]
    lines = []
    for number in range(count):
        waves = [(127 + 100 * np.sin((x * (c + 1) + y * 2 + 40 * number) / 90)) for c in range(3)]
        image = np.stack(waves, -1) + random.integers(-8, 9, (480, 640, 3))
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(
            root / f"{number:05d}.png", compress_level=1
        )
        lines.append(f'{{"images": ["{number:05d}.png"]}}')
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")


def encoder_alone_s(encoder: Encoder, pixels: list[torch.Tensor], batch_size: int) -> float:
    began_s = time.perf_counter()
    for start in range(0, len(pixels), batch_size):
        encoder.frame_features(torch.stack(pixels[start : start + batch_size]).to(encoder.device))
    if encoder.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began_s


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


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    root = folder / "data"
    root.mkdir()
    write_frames(root, arguments.frames)
    model = arguments.vggt_model_path or str(write_checkpoint(folder / "model"))
    settings = PrecomputeSettings(
        data_root=str(root),
        cache_dir=str(folder / "cache"),
        vggt_model_path=model,
        image_size=arguments.image_size,
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
        device=arguments.device,
    )
    encoder = Checkpoint.open(model).load(
        device=arguments.device, compute_dtype=choose_compute_dtype("auto", arguments.device)
    )
    paths = sorted(root.glob("*.png"))
    pixels = [torch.from_numpy(decode_frame(read_frame(path), settings.preprocessing)) for path in paths]
    encoder_alone_s(encoder, pixels[: 2 * arguments.batch_size], arguments.batch_size)

    before_s = encoder_alone_s(encoder, pixels, arguments.batch_size)
    began_s = time.perf_counter()
    if precompute(settings) != 0:
        raise SystemExit("precompute failed")
    precompute_s = time.perf_counter() - began_s
    after_s = encoder_alone_s(encoder, pixels, arguments.batch_size)

    limit_s = (before_s + after_s) / 2
    return {
        "frames": len(paths),
        "mean_png_bytes": round(sum(path.stat().st_size for path in paths) / len(paths)),
        "encoder_alone_s": round(limit_s, 3),
        "encoder_alone_before_and_after_s": [round(before_s, 3), round(after_s, 3)],
        "precompute_s": round(precompute_s, 3),
        "ratio": round(precompute_s / limit_s, 4),
        "frames_per_s": round(len(paths) / precompute_s, 3),
    }


if __name__ == "__main__":
    main()

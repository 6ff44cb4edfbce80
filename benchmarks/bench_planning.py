"""Planning an unchanged data set: seconds, memory, and that no image is opened.

Theory. What has to be computed follows from annotations and from the metadata of images: the digest of an unchanged
file (same path, size, mtime, ctime, inode) is known from the run before. So the limit is reading the annotations once
(`json_parse_s`: the standard library's parser alone on the same bytes) and one stat per image (`stat_s`).

The tree is made up: `--samples` samples of nine frames that name `--images` small images. The first run computes them
with the demo's encoder on one patch each; the second run, in a fresh process, is what is measured. An audit hook in
that process counts which files are opened.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import record
from vggt_cache.demo.checkpoint import write_checkpoint

PER_FOLDER = 200


def write_tree(root: Path, images: int, samples: int) -> None:
    names = []
    for number in range(images):
        folder = root / f"{number // PER_FOLDER:05d}"
        folder.mkdir(exist_ok=True)
        pixels = np.full((16, 16, 3), number % 251, np.uint8)
        pixels[0, 0] = [number & 255, number >> 8 & 255, number >> 16]
        Image.fromarray(pixels).save(folder / f"{number % PER_FOLDER:04d}.png")
        names.append(f"{folder.name}/{number % PER_FOLDER:04d}.png")
    with open(root / "train.jsonl", "w") as file:
        for sample in range(samples):
            last = sample * images // samples
            first = last // PER_FOLDER * PER_FOLDER
            frames = [names[first + (last - first) * part // 8] for part in range(9)]
            file.write(json.dumps({"id": str(sample), "images": frames, "conversations": []}) + "\n")


def child(arguments: list[str], report: str) -> None:
    """Run the command line in this process and write down what it cost."""
    opened = {"images": 0, "files": 0}

    def count(event: str, details: tuple[object, ...]) -> None:
        if event == "open":
            opened["files"] += 1
            opened["images"] += str(details[0]).endswith(".png")

    sys.addaudithook(count)
    from vggt_cache.cli import main as command

    began_s = time.perf_counter()
    exit_code = command(arguments)
    elapsed_s = time.perf_counter() - began_s
    # Not getrusage: its maximum starts with what the process was before exec.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    Path(report).write_text(
        json.dumps(
            {"exit_code": exit_code, "elapsed_s": elapsed_s, "peak_memory_bytes": peak, "opened": opened}
        )
    )


def measured(arguments: list[str], folder: Path) -> dict[str, object]:
    report = folder / "report.json"
    subprocess.run([sys.executable, __file__, "--child", str(report), *arguments], check=True)
    result: dict[str, object] = json.loads(report.read_text())
    return result


def limits(root: Path) -> dict[str, float]:
    began_s = time.perf_counter()
    with open(root / "train.jsonl", "rb") as file:
        for line in file:
            json.loads(line)
    parsed_s = time.perf_counter()
    for folder, _, files in os.walk(root):
        for name in files:
            os.stat(os.path.join(folder, name))
    return {"json_parse_s": parsed_s - began_s, "stat_s": time.perf_counter() - parsed_s}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--context", default="frame")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    try:
        root = folder / "data"
        root.mkdir()
        write_tree(root, arguments.images, arguments.samples)
        command = [
            "precompute",
            "--vggt_model_path",
            str(write_checkpoint(folder / "model")),
            "--data_root",
            str(root),
        ]
        command += [
            "--cache_dir",
            str(folder / "cache"),
            "--context",
            arguments.context,
            "--image_size",
            "14",
        ]
        command += ["--batch_size", "128", "--num_workers", "2", "--device", "cpu"]
        first = measured(command, folder)
        second = measured(command, folder)
        record.write(
            "planning",
            "cpu",
            vars(arguments),
            {"first_run": first, "unchanged_run": second, "limits": limits(root)},
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[3:], sys.argv[2])
    else:
        main()

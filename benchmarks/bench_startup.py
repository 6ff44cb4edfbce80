"""From the start of a training process to its first step, where everything is in the cache.

Theory. Nothing has to be computed, and no image but those of the first batch has to be opened. What is left: loading
Python's libraries and the model (the same whatever the data: measured with a data root of 64 samples), and reading the
annotations twice, of which the standard library's JSON parser alone on the same bytes is half the limit beside it: once
to count the samples, and once to look at each of them and to count coverage, with the metadata of all images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import record
from bench_planning import PER_FOLDER, write_tree
from janusvln.demo.tiny_qwen import write_tiny_qwen
from vggt_cache.demo.checkpoint import write_checkpoint

PROMPT = (
    "You are a visual language navigation model. This is your historical observation:"
    + "<image>" * 8
    + " This is your "
    "current observation:<image> Your task is to walk past the sofa, through the second door on the left, and stop at "
    "the window. You should take one of the following actions: MOVE_FORWARD TURN_LEFT TURN_RIGHT STOP."
)


def write_annotations(root: Path, images: int, samples: int) -> None:
    """Conversations of nine frames each, over the images that `write_tree` has written."""
    turns = [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "MOVE_FORWARD"}]
    with open(root / "train.jsonl", "w") as file:
        for sample in range(samples):
            last = sample * images // samples
            first = last // PER_FOLDER * PER_FOLDER
            numbers = [first + (last - first) * part // 8 for part in range(9)]
            frames = [f"{one // PER_FOLDER:05d}/{one % PER_FOLDER:04d}.png" for one in numbers]
            file.write(json.dumps({"id": str(sample), "images": frames, "conversations": turns}) + "\n")


def seconds_to_first_step(folder: Path, data: Path) -> float:
    """Until the first step's line is in the log."""
    command = [
        sys.executable, "-m", "janusvln.train", "--model_name_or_path", folder / "qwen",
        "--train_data_root", data, "--vggt_cache_dir", folder / "cache", "--output_dir", folder / "out",
        "--max_steps", "1", "--logging_steps", "1", "--use_cpu", "True", "--save_strategy", "no", "--report_to", "none",
        "--min_pixels", "784", "--disable_tqdm", "True",
    ]  # fmt: skip
    began_s = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    elapsed_s = next(time.perf_counter() - began_s for line in process.stdout if line.startswith("{'loss'"))
    process.communicate()
    return elapsed_s


def parse_s(path: Path) -> float:
    began_s = time.perf_counter()
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - began_s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=600_000)
    parser.add_argument("--images", type=int, default=20_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, few = folder / "data", folder / "few"
        data.mkdir()
        write_tree(data, arguments.images, 1)
        write_annotations(data, arguments.images, arguments.samples)
        few.mkdir()
        for number in range(arguments.images // PER_FOLDER):
            (few / f"{number:05d}").symlink_to(data / f"{number:05d}")
        write_annotations(few, arguments.images, 64)
        write_tiny_qwen(folder / "qwen")
        precompute = [
            sys.executable, "-m", "vggt_cache", "precompute", "--vggt_model_path", write_checkpoint(folder / "model"),
            "--data_root", data, "--cache_dir", folder / "cache", "--image_size", "28", "--batch_size", "128",
            "--num_workers", "2", "--device", "cpu",
        ]  # fmt: skip
        subprocess.run(list(map(str, precompute)), check=True)
        seconds_to_first_step(folder, few)  # the first start of all fills the page cache
        started_few_s, started_s = seconds_to_first_step(folder, few), seconds_to_first_step(folder, data)
        record.write(
            "startup",
            "cpu",
            vars(arguments),
            {
                "seconds_to_first_step": started_s,
                "seconds_to_first_step_of_64_samples": started_few_s,
                "seconds_for_the_data": started_s - started_few_s,
                "json_parse_s": parse_s(data / "train.jsonl"),
                "annotation_bytes": (data / "train.jsonl").stat().st_size,
            },
        )


if __name__ == "__main__":
    main()

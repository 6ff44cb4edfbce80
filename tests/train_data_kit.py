"""A tiny model's directory, small annotated images and datasets over them, for the tests of training data."""

from __future__ import annotations

import atexit
import json
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from janusvln.data.dataset import DataOptions, NavigationDataset, sources_of
from janusvln.demo.tiny_qwen import write_tiny_qwen
from small_data import write_image
from store_kit import make_spec
from vggt_cache.identity import FeatureSpec
from vggt_cache.samples import SampleIndex

SPEC = make_spec(image_size=56)
"""64x48 images become grids of 3 x 4 patches, of which Qwen sees 2 x 4: two tokens."""
CAUSAL = make_spec(image_size=56, context="causal")

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"


@cache
def tiny_qwen() -> Path:
    """Made once for all tests of a process."""
    directory = Path(mkdtemp(prefix="tiny_qwen_"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return write_tiny_qwen(directory)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_qwen())
    return tokenizer


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_frames(root: Path, count: int, size: tuple[int, int] = (64, 48)) -> list[str]:
    """Images `0.png`, `1.png`, ... below root; returns their names."""
    return [write_image(root / f"{number}.png", number, size).name for number in range(count)]


def write_records(root: Path, records: Sequence[dict[str, Any]], name: str = "train.jsonl") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_dataset(
    root: Path, spec: FeatureSpec = SPEC, *, action_head: bool = False, **options: Any
) -> NavigationDataset:
    index = SampleIndex(sources_of(str(root), None, None), on_problem=_fail)
    return NavigationDataset(
        index,
        tiny_tokenizer(),
        model_dir=str(tiny_qwen()),
        spec=spec,
        options=DataOptions(**options),
        action_head=action_head,
    )


def _fail(problem: object) -> None:
    raise AssertionError(problem)


def text_of(ids: torch.Tensor | Sequence[int]) -> str:
    return str(tiny_tokenizer().decode(ids, skip_special_tokens=False))


def learned(item: dict[str, Any]) -> str:
    return text_of(item["labels"][item["labels"] != -100])

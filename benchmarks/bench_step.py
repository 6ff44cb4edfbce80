"""A training step with features from the cache, beside the same step computed live and with features at hand.

Theory. A step cannot be faster than with its features already in the device's memory (d): what a cache may cost is what
it adds to that. So every batch is stepped four times, one after the other, in one process, with the same model, the
same optimizer and the same tokens and pixels; only the way to the features differs:

    a  reference   the published way: the encoder frame by frame, sample by sample, nothing shared, inside the step
    b  live        this project's encoder on a miss: the frames of a list in one walk, only what the feature needs
    c  cached      read from disk (page cache) by reader threads, announced one step ahead, checksums verified
    d  resident    in memory before the step begins

The middle of all steps counts, and for c/d the middle of the pairs that were stepped one right after the other, so that
a disturbance of single steps has no part. `--size real`: Qwen2.5-VL-3B and
VGGT-1B in their published shapes with random weights, bfloat16, gradient checkpointing. `--size tiny`: for a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import record
from bench_causal import one_by_one
from bench_encoder import SIZES, random_weights, synchronize
from qwen_vl.data import DataOptions, NavigationDataset, PaddedCollator, SampleIndex
from qwen_vl.demo.tiny_qwen import TOKEN_IDS, tiny_config, write_tiny_qwen
from qwen_vl.features.fill import CacheFiller
from qwen_vl.features.live import LiveEncoder
from qwen_vl.features.read_ahead import ReadAhead
from qwen_vl.features.request import FeatureRequest
from qwen_vl.features.source import FeatureSource
from qwen_vl.model.config import JanusVLNConfig, as_janusvln_config
from qwen_vl.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN
from vggt_cache.demo.dataset import write_dataset
from vggt_cache.encoder import Encoder
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.samples import find_sources
from vggt_cache.store import FeatureCache

Requests = Sequence[FeatureRequest]
Features = list[torch.Tensor]
WAYS = ("reference", "live", "cached", "resident")
_CURRENT = 23
"""The step of an episode whose sample has a full history of nine frames."""


def real_config() -> JanusVLNConfig:
    """Qwen2.5-VL-3B-Instruct's published shapes; special tokens as in the tiny tokenizer."""
    text = {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    tokens = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    ids = {name: TOKEN_IDS[token] for name, token in tokens.items()}
    return JanusVLNConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


class Bench:
    """One model, one encoder, a cache of the features, and the batches."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.real = arguments.size == "real"
        compute_dtype = "bfloat16" if self.real else "float32"
        config = SIZES["1b" if self.real else "small"]
        with torch.no_grad():
            self.encoder = random_weights(Encoder(config, compute_dtype=compute_dtype).to(self.device))
        self.spec = _spec(self.encoder, arguments.image_size, compute_dtype)
        self.batches = self._batches(folder)
        self.live = LiveEncoder(None, self.spec, self.device, encoder=self.encoder)
        self.resident = self._fill(folder / "cache")
        self.cache = FeatureCache.open(folder / "cache")
        self.source = FeatureSource(
            cache=self.cache, reader=ReadAhead(self.cache, self.device), encoder=self.live, miss="error"
        )
        self.model = self._model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def _batches(self, folder: Path) -> list[dict[str, Any]]:
        data = write_dataset(folder / "data", episodes=2 * self.arguments.batch_size, steps=_CURRENT + 1)
        qwen = write_tiny_qwen(folder / "qwen")
        index = SampleIndex.build(find_sources(str(data.conversations)), on_problem=print)
        dataset = NavigationDataset(
            index,
            AutoTokenizer.from_pretrained(qwen),
            spec=self.spec,
            options=DataOptions(model_dir=str(qwen), min_pixels=784),
        )
        full = [at for at in range(len(index)) if index.frame_counts[at] == 9]
        collate = PaddedCollator(TOKEN_IDS["<|endoftext|>"])
        size = self.arguments.batch_size
        chosen = [full[(7 * at) % len(full)] for at in range(size * self.arguments.batches)]
        groups = [chosen[at : at + size] for at in range(0, len(chosen), size)]
        batches = [collate([dataset[at] for at in group]) for group in groups]
        for batch in batches:
            frames = [request.frames for request in batch["feature_requests"]]
            batch["pixel_values"] = torch.cat([dataset.pixels.values(one) for one in frames])
        return batches

    def _fill(self, cache_dir: Path) -> list[Features]:
        """Store every feature; returns them, per batch, on the device."""
        filler = CacheFiller(str(cache_dir), self.spec)
        resident = []
        for batch in self.batches:
            resident.append(self.live.encode(batch["feature_requests"]))
            filler.put(batch["feature_requests"], resident[-1])
        filler.close()
        return resident

    def _model(self) -> Qwen2_5_VLForConditionalGenerationForJanusVLN:
        config = real_config() if self.real else as_janusvln_config(tiny_config())
        config.spatial_channels = self.spec.encoder.channels
        with torch.device(self.device):
            torch.manual_seed(0)
            model = Qwen2_5_VLForConditionalGenerationForJanusVLN._from_config(
                config, dtype=torch.bfloat16 if self.real else torch.float32
            )
        model.model.visual.requires_grad_(False)
        if self.real:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model.train()

    # ------------------------------------------------------------ one step

    def step(self, number: int, features: Callable[[], Features]) -> float:
        """Seconds of a whole step, features and optimizer included."""
        batch = self.batches[number]
        tensors = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name != "feature_requests"
        }
        synchronize(self.device)
        began_s = time.perf_counter()
        self.model(**tensors, spatial_features=features()).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - began_s

    def features(self, way: str, number: int) -> Features:
        requests = self.batches[number]["feature_requests"]
        if way == "resident":
            return self.resident[number]
        if way == "live":
            return self.live.encode(requests)
        if way == "cached":
            return self.source.take(requests)
        with torch.no_grad():
            return [_published(self.encoder, request) for request in requests]

    def run(self, ways: Sequence[str], rounds: int) -> dict[str, list[float]]:
        """Seconds of each step, by way. The cache's reads are announced one step ahead, as the trainer does."""
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        order = [number % len(self.batches) for number in range(rounds)]
        if "cached" in ways:
            self.source.expect(self.batches[order[0]]["feature_requests"])
        for at, number in enumerate(order):
            turn = at % len(ways)  # another way begins in each round
            for way in [*ways[turn:], *ways[:turn]]:
                if way == "cached" and at + 1 < rounds:
                    # Announced before this step takes its own, so that reading goes on beside the step.
                    self.source.expect(self.batches[order[at + 1]]["feature_requests"])
                seconds[way].append(
                    self.step(number, lambda way=way, number=number: self.features(way, number))
                )
                if way == "cached":
                    self.source.step_done()
        return seconds

    def memory(self, way: str) -> dict[str, int]:
        """Peak bytes on the GPU of a step in this way; the encoder is there only where it is used."""
        if self.device.type != "cuda":
            return {}
        self.encoder.to(self.device if way in ("reference", "live") else "cpu")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.run([way], 2)
        peak = torch.cuda.max_memory_allocated()
        self.encoder.to(self.device)
        return {"peak_bytes": peak}


def _published(encoder: Encoder, request: FeatureRequest) -> torch.Tensor:
    return one_by_one(encoder, list(range(len(request.frames))), request.frames).bfloat16()


def _spec(encoder: Encoder, image_size: int, compute_dtype: str) -> FeatureSpec:
    """The encoder's values are drawn here, so that no checkpoint has a digest for them."""
    config = encoder.config
    fields = {
        name: getattr(config, name)
        for name in ("embed_dim", "depth", "num_heads", "img_size", "patch_size", "patch_embed")
    }
    identity = EncoderSpec(
        weights_digest="0" * 64, layer=encoder.layer, compute_dtype=compute_dtype, **fields
    )
    return FeatureSpec(encoder=identity, preprocessing=Preprocessing(image_size=image_size), context="causal")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--size", choices=("tiny", "real"), default="real" if on_gpu else "tiny")
    parser.add_argument("--image_size", type=int, default=644 if on_gpu else 280)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=8, help="different batches")
    parser.add_argument("--rounds", type=int, default=8, help="steps of each of the four ways")
    parser.add_argument("--pairs", type=int, default=80, help="further pairs of a cached and a resident step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        bench.run(WAYS, 2)  # the first steps are slower
        bench.source.take_counts()
        seconds = bench.run(WAYS, arguments.rounds)
        for way, times in bench.run(("cached", "resident"), arguments.pairs).items():
            seconds[way] += times
        pairs = [one / two for one, two in zip(seconds["cached"], seconds["resident"], strict=True)]
        middle = {way: statistics.median(times) for way, times in seconds.items()}
        counts = bench.source.take_counts()
        figures = {
            "seconds_per_step": middle,
            "cached_over_resident": statistics.median(pairs),
            "reference_over_cached": middle["reference"] / middle["cached"],
            "live_over_cached": middle["live"] / middle["cached"],
            "cache_wait_ms": 1e3 * counts.wait_s / counts.batches,
            "feature_bytes": bench.resident[0][0].nbytes,
            "tokens": bench.batches[0]["input_ids"].shape[1],
            "memory": {way: bench.memory(way) for way in WAYS} if bench.device.type == "cuda" else {},
            "seconds": {way: [round(one, 5) for one in times] for way, times in seconds.items()},
        }
        bench.source.close()
    record.write("step", arguments.device, vars(arguments), figures)


if __name__ == "__main__":
    main()

"""One model, one encoder and one cache, and a training step that takes its features in one of four ways.

For `bench_step.py`, whose docstring says what the ways are.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench_causal import one_by_one
from bench_encoder import SIZES, random_encoder
from janusvln.data.collate import PaddedCollator
from janusvln.data.dataset import DataOptions, NavigationDataset
from janusvln.data.images import FeatureRequest
from janusvln.demo.tiny_qwen import TOKEN_IDS, tiny_config, write_tiny_qwen
from janusvln.features.computed import CacheFiller, LiveEncoder
from janusvln.features.source import FeatureSource
from janusvln.model.config import JanusVLNConfig, as_janusvln_config
from janusvln.model.modeling_qwen2_5_vl import Qwen2_5_VLForConditionalGenerationForJanusVLN
from profile_parts import synchronize
from vggt_cache.delivery import ReadAhead
from vggt_cache.demo.dataset import write_dataset
from vggt_cache.encoder import Encoder
from vggt_cache.identity import EncoderSpec, FeatureSpec, Preprocessing
from vggt_cache.samples import SampleIndex, find_sources
from vggt_cache.store import FeatureCache

Requests = Sequence[FeatureRequest]
Features = list[torch.Tensor]
WAYS = ("reference", "live", "cached", "resident")
_STEPS = 12
"""Of an episode: the samples of the last four have a full history of nine frames."""


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


class Stepper:
    """One model, one encoder, a cache of the features, and the batches."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        self.device = torch.device(arguments.device)
        self.real = arguments.size == "real"
        compute_dtype = "bfloat16" if self.real else "float32"
        config = SIZES["1b" if self.real else "small"]
        self.encoder = random_encoder(config, self.device, compute_dtype)
        self.spec = _spec(self.encoder, arguments.image_size, compute_dtype)
        self.items = self._items(folder)
        size = arguments.batch_size
        self.batches = [self.batch_of(self.items[at : at + size]) for at in range(0, len(self.items), size)]
        self.live = self.new_live()
        self._fill(folder / "cache")
        self.cache = FeatureCache.open(folder / "cache", context="causal")
        reader = ReadAhead(self.cache, self.device)
        self.source = FeatureSource(reader=reader, encoder=self.live, miss="error")
        self.model = self._model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def new_live(self) -> LiveEncoder:
        return LiveEncoder(None, self.spec, self.device, encoder=self.encoder)

    def _items(self, folder: Path) -> list[dict[str, Any]]:
        """Samples with a full history, enough for all batches."""
        data = write_dataset(folder / "data", episodes=2 * self.arguments.batch_size, steps=_STEPS)
        qwen = write_tiny_qwen(folder / "qwen")
        index = SampleIndex(find_sources(str(data.root / "conversations")), on_problem=print)
        dataset = NavigationDataset(
            index,
            AutoTokenizer.from_pretrained(qwen),
            model_dir=str(qwen),
            spec=self.spec,
            options=DataOptions(min_pixels=784),
        )
        self._pixels = dataset.pixels
        full = [at for at in range(len(index)) if index.frame_counts[at] == 9]
        count = self.arguments.batch_size * self.arguments.batches
        return [dataset[full[(7 * at) % len(full)]] for at in range(count)]

    def batch_of(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What a step takes. `resident_features` is added when they are known."""
        batch = PaddedCollator(TOKEN_IDS["<|endoftext|>"])(items)
        frames = [request.frames for request in batch["feature_requests"]]
        batch["pixel_values"] = torch.cat([self._pixels.values(one) for one in frames])
        return batch

    def _fill(self, cache_dir: Path) -> None:
        """Compute every feature; they are stored, and lie on the device as well."""
        filler = CacheFiller(str(cache_dir), self.spec)
        for batch in self.batches:
            batch["resident_features"] = self.live.encode(batch["feature_requests"])
            filler.put(batch["feature_requests"], batch["resident_features"])
        filler.close()

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

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of a batch, without the features."""
        return {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("feature_requests", "resident_features")
        }

    def step(self, batch: dict[str, Any], features: Callable[[], Features]) -> float:
        """Seconds of a whole step, features and optimizer included."""
        tensors = self.on_device(batch)
        synchronize(self.device)
        began_s = time.perf_counter()
        self.model(**tensors, spatial_features=features()).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize(self.device)
        return time.perf_counter() - began_s

    def features(self, way: str, batch: dict[str, Any]) -> Features:
        requests = batch["feature_requests"]
        if way == "resident":
            found: Features = batch["resident_features"]
            return found
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
                batch = self.batches[number]
                seconds[way].append(self.step(batch, lambda way=way, batch=batch: self.features(way, batch)))
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

"""Where features are computed: in this process, beside others that claim blocks too, or in processes of a cluster."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch

from vggt_cache.encoder import Checkpoint
from vggt_cache.identity import FeatureSpec
from vggt_cache.pixels import Pixels
from vggt_cache.precompute.claimed import ClaimedRun
from vggt_cache.precompute.encode import BatchEncoder, load_encoder
from vggt_cache.precompute.pipeline import Tally
from vggt_cache.precompute.plan import Block
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.settings import PrecomputeSettings, QwenLimits, choose_device
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import Stored


class Engine(Protocol):
    """`prepare` comes before all else. What computes raises VggtCacheError."""

    @property
    def device(self) -> str:
        """Of torch, or only its kind; known from the beginning."""

    def prepare(self, checkpoint: Checkpoint, spec: FeatureSpec, limits: QwenLimits | None) -> None:
        """Say what is to be computed. Loads nothing."""

    def compute(self, stored: Stored, blocks: Sequence[Block], stop: StopRequest) -> Tally:
        """Returns when every feature of the blocks is stored or lost, or when asked to stop; all is committed then."""

    @property
    def device_name(self) -> str:
        """As its maker calls it; `cpu`."""

    def seconds(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> float:
        """What encoding these lists takes one process."""

    def alone(self, pixels: Mapping[int, Pixels]) -> torch.Tensor:
        """The feature of one list, its frames in this order, with nothing else in the batch; on the CPU."""

    def close(self) -> None:
        """May be called again."""


class EncoderHere:
    """The encoder in this process, loaded when it is first needed: a run that finds all in the cache loads none."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: FeatureSpec,
        device: str,
        batch_size: int,
        reporter: Reporter,
    ) -> None:
        self.checkpoint, self.spec, self.device = checkpoint, spec, device
        self._batch_size, self._reporter = batch_size, reporter

    @cached_property
    def batches(self) -> BatchEncoder:
        return load_encoder(self.checkpoint, self.spec, self.device, self._batch_size, self._reporter)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else "cpu"

    def seconds(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> float:
        """Of the second of two runs: the first one warms up."""
        encoder = self.batches
        for _ in range(2):
            began_s = time.perf_counter()
            list(self.spec.context_rule.encode(encoder, lists, pixels))
            if encoder.device.type == "cuda":
                torch.cuda.synchronize(encoder.device)
        return time.perf_counter() - began_s

    def alone(self, pixels: Mapping[int, Pixels]) -> torch.Tensor:
        ((_, fresh),) = self.spec.context_rule.encode(
            BatchEncoder(self.batches.encoder, 1), [list(pixels)], pixels
        )
        return fresh[0].cpu()


class ThisProcess:
    """The engine that is there without being asked for."""

    def __init__(self, settings: PrecomputeSettings, reporter: Reporter) -> None:
        self.device = choose_device(settings.device)
        self._settings, self._reporter = settings, reporter

    def prepare(self, checkpoint: Checkpoint, spec: FeatureSpec, limits: QwenLimits | None) -> None:
        self._encoder = EncoderHere(checkpoint, spec, self.device, self._settings.batch_size, self._reporter)
        self._limits = limits
        self.seconds, self.alone = self._encoder.seconds, self._encoder.alone

    @property
    def device_name(self) -> str:
        return self._encoder.device_name

    def compute(self, stored: Stored, blocks: Sequence[Block], stop: StopRequest) -> Tally:
        run = ClaimedRun(
            stored=stored,
            reporter=self._reporter,
            stop=stop,
            num_workers=self._settings.num_workers,
            codec=self._settings.codec,
            limits=self._limits,
        )
        return run.compute(blocks, self._encoder.batches)

    def close(self) -> None:
        """There is nothing to end."""


def engine_of(settings: PrecomputeSettings, reporter: Reporter) -> Engine:
    """Raises SettingsError where its package is missing, or its cluster does not answer."""
    if settings.engine == "ray":
        from vggt_cache.precompute.ray_engine import RayEngine  # only here: few have its package

        return RayEngine(settings, reporter)
    return ThisProcess(settings, reporter)

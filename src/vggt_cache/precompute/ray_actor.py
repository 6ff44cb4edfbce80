"""One process of a cluster: what a driver tells it to, it decodes, encodes, and commits in shards of its own.

There is no Ray here: the class becomes an actor where it is used. Two threads call it. `compute` and `flush` are called
one after the other in the first; `prepare` and `stop` are quick, and come in the second meanwhile.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from vggt_cache.encoder import Checkpoint
from vggt_cache.errors import CheckpointError, VggtCacheError
from vggt_cache.identity import FeatureSpec
from vggt_cache.pixels import Pixels
from vggt_cache.precompute.decode import DecodePool
from vggt_cache.precompute.driver import Report, Said
from vggt_cache.precompute.encode import BatchEncoder
from vggt_cache.precompute.engine import EncoderHere
from vggt_cache.precompute.pipeline import Decoding, Outcome, Pipeline
from vggt_cache.precompute.plan import Task
from vggt_cache.precompute.report import Reporter
from vggt_cache.precompute.settings import PrecomputeSettings, QwenLimits, choose_device
from vggt_cache.precompute.stop import StopRequest
from vggt_cache.precompute.stored import StoredKeys
from vggt_cache.precompute.todo import Seldom
from vggt_cache.store import FeatureCache

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process of the cluster needs to know before it begins. Paths are absolute."""

    settings: PrecomputeSettings
    """The device by its kind alone: which card it is, is each process's own matter."""
    spec: FeatureSpec
    shard_bytes: int
    limits: QwenLimits | None


class KeptWords(Reporter):
    """What a process would tell its user: kept until the driver, who has the user, asks."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: queue.SimpleQueue[Said] = queue.SimpleQueue()

    def info(self, text: str) -> None:
        self._kept.put(("info", (text,)))

    def warn(self, text: str) -> None:
        self._kept.put(("warn", (text,)))

    def remark(self, path: str, text: str) -> None:
        if text not in self._remarks:
            self._remarks.add(text)
            self._kept.put(("remark", (path, text)))

    def failed(self, path: str, reason: str) -> None:
        self._kept.put(("failed", (path, reason)))

    def take(self) -> list[Said]:
        return _taken(self._kept)


class EncodingProcess:
    """Every call raises VggtCacheError, and returns what there is to tell since the last one."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._words, self._stop = KeptWords(), StopRequest()
        self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
        self._prepared: queue.SimpleQueue[tuple[Task, Decoding] | Exception] = queue.SimpleQueue()
        self._seldom = Seldom()

    def begin(self, ignored: Iterable[str]) -> Report:
        """Look whether this machine is fit. `ignored`: shards that do not count."""
        order = self._order
        try:
            replace(order.settings)  # which checks the settings here, and what they need
            _ = self._encoder
            cache = FeatureCache.open(order.settings.cache_dir, spec=order.spec)
        except VggtCacheError as error:
            error.args = (f"{error} (on {socket.gethostname()})",)
            raise
        recompute = not order.settings.skip_existing
        self._stored = StoredKeys(cache, recompute=recompute, ignored=ignored)
        self._decoder = DecodePool(order.settings.num_workers, order.spec.preprocessing)
        return self._report()

    def prepare(self, task: Task) -> None:
        """Begin to decode what `compute` is called for next."""
        try:
            decoding = {frame: self._decoder.submit(path) for frame, path in task.paths.items()}
            self._prepared.put((task, decoding))
        except Exception as error:  # there is nobody to tell it but `compute`, which waits
            self._prepared.put(error)

    def compute(self) -> Report:
        prepared = self._prepared.get()
        if isinstance(prepared, Exception):
            raise prepared
        if not self._stop.requested:
            self._seldom.do(self._stored.cache.refresh)
            self._pipeline.compute(*prepared)
        return self._report()

    def flush(self) -> Report:
        """When all that was computed is on the disk."""
        if "_pipeline" in vars(self):  # none is made for this alone
            self._pipeline.flush()
        return self._report()

    def stop(self) -> None:
        """Compute no more: go on to the end of a batch, and leave the rest."""
        self._stop.signal_number = signal.SIGTERM

    def seconds(self, lists: Sequence[Sequence[int]], pixels: Mapping[int, Pixels]) -> Report:
        """See `Engine.seconds`; and the name of the device."""
        return self._report((self._encoder.seconds(lists, pixels), self._encoder.device_name))

    def alone(self, pixels: Mapping[int, Pixels]) -> Report:
        """See `Engine.alone`."""
        return self._report(self._encoder.alone(pixels))

    def _report(self, value: object = None) -> Report:
        return Report(outcomes=_taken(self._outcomes), said=self._words.take(), value=value)

    @cached_property
    def _encoder(self) -> EncoderHere:
        order, settings = self._order, self._order.settings
        device = choose_device(settings.device)
        checkpoint = Checkpoint.open(settings.vggt_model_path, layer=settings.wanted_layers)
        return EncoderHere(checkpoint, order.spec, device, settings.batch_size, self._words)

    def _checked_batches(self) -> BatchEncoder:
        """Raises CheckpointError where this machine has other weights than the driver's under that name."""
        batches = self._encoder.batches
        wanted, found = self._order.spec.encoder, self._encoder.checkpoint
        if found.spec(wanted.compute_dtype) != wanted:
            raise CheckpointError(
                f"{found.location} is another checkpoint on {socket.gethostname()} than where the run was started: "
                "features would carry the identity of other weights; give a path that is the same everywhere"
            )
        return batches

    @cached_property
    def _pipeline(self) -> Pipeline:
        order, settings = self._order, self._order.settings
        return Pipeline(
            stored=self._stored,
            encoder=self._checked_batches(),
            submit=lambda frame, path: self._decoder.submit(path),
            store_dir=os.path.join(settings.cache_dir, order.spec.short_name),
            shard_bytes=order.shard_bytes,
            reporter=self._words,
            stop=self._stop,
            codec=settings.codec,
            limits=order.limits,
            on_outcome=self._outcomes.put,
        )


def _taken(waiting: queue.SimpleQueue[T]) -> list[T]:
    """All that is there by now."""
    taken: list[T] = []
    with suppress(queue.Empty):
        while True:
            taken.append(waiting.get_nowait())
    return taken

"""Features read ahead of the training step, by threads of the training process.

    announced keys ──> reader threads: pread into a reused buffer, checksum ──> copy to the device
                                                                       (on a stream of its own; int8 is decoded there)

Features do not go through DataLoader workers: sent through torch's queue they arrive about ten times more
slowly than threads read them here. Reading and hashing release the interpreter lock.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from janusvln.features.host_buffers import HostBuffers
from vggt_cache.codec import INT8
from vggt_cache.codec.base import Int8
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache
from vggt_cache.store.tensors import TORCH_DTYPES

T = TypeVar("T")
THREADS = 2
RETRY_PAUSES_S = (0.2, 1.0)
"""Between attempts at a read that the operating system refuses: a mount may only stumble."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """What a reader thread delivers; `feature` is None where the key is not in the cache."""

    feature: torch.Tensor | None
    copied: torch.cuda.Event | None = None
    """When the copy to the device is complete; None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class PendingRead:
    buffer: torch.Tensor
    """Host memory that the record is read into: the feature [h, w, C], or the bytes of one in int8."""
    result: Future[Arrived]


class ReadAhead:
    """Reads features of one cache onto one device. All methods are for the training thread."""

    def __init__(self, cache: FeatureCache, device: torch.device, *, threads: int = THREADS) -> None:
        self._cache = cache
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._channels = cache.spec.encoder.channels
        self._is_int8 = cache.spec.feature_dtype == INT8
        dtype = torch.uint8 if self._is_int8 else TORCH_DTYPES[cache.spec.feature_dtype]
        self._buffers = HostBuffers(dtype, pinned=self._on_gpu)
        self._copying: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None  # type: ignore[no-untyped-call]
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="feature-reader")

    def start(self, key: bytes, grid: tuple[int, int]) -> PendingRead:
        """Begin to read the feature of a key, whose grid (h, w) is known from its frame."""
        self._reclaim()
        buffer = self._buffers.take(self._buffer_shape(grid))
        return PendingRead(buffer=buffer, result=self._threads.submit(self._read, key, buffer))

    def wait(self, read: PendingRead) -> torch.Tensor | None:
        """The feature [h, w, C] on the device; None when the key is not in the cache.

        On a CPU it may lie in the read's buffer, and is valid until `release`. Raises what reading raised: a
        StoreError.
        """
        arrived = read.result.result()
        if arrived.feature is not None and arrived.copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived.copied)
            arrived.feature.record_stream(current)
        return arrived.feature

    def settle(self, reads: Sequence[PendingRead]) -> None:
        """Return when all reads have ended, one way or another.

        Waking up once, and not for each of them, leaves the processors to the readers.
        """
        futures.wait([read.result for read in reads])

    def release(self, read: PendingRead) -> None:
        """The step that used the feature is over: its buffer may be used again."""
        if not read.result.cancel():
            copied = None if read.result.exception() else read.result.result().copied
            if copied is not None:
                self._copying.append((copied, read.buffer))
                return
        self._buffers.give_back(read.buffer)

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _reclaim(self) -> None:
        while self._copying and self._copying[0][0].query():  # type: ignore[no-untyped-call]
            self._buffers.give_back(self._copying.popleft()[1])

    def _buffer_shape(self, grid: tuple[int, int]) -> tuple[int, ...]:
        if not self._is_int8:
            return self._cache.spec.context_rule.shape(*grid, self._channels)
        return (Int8().size_limits(grid[0] * grid[1], self._channels)[0],)

    # ------------------------------------------------------------ in the threads

    def _read(self, key: bytes, buffer: torch.Tensor) -> Arrived:
        if self._is_int8:
            encoded = with_retries(lambda: self._cache.get_encoded(key, out=buffer))
            return self._sent(None if encoded is None else encoded.decode_on)
        feature = with_retries(lambda: self._cache.get_by_key(key, out=buffer))
        return self._sent(None if feature is None else lambda device: feature.to(device, non_blocking=True))

    def _sent(self, to_device: Callable[[torch.device], torch.Tensor] | None) -> Arrived:
        if to_device is None:
            return Arrived(feature=None)
        if self._stream is None:
            return Arrived(feature=to_device(self._device))
        with torch.cuda.stream(self._stream):
            return Arrived(feature=to_device(self._device), copied=self._stream.record_event())


def with_retries(read: Callable[[], T]) -> T:
    """Call `read` again after a pause where the operating system refused, a bounded number of times."""
    for pause_s in RETRY_PAUSES_S:
        try:
            return read()
        except CacheAccessError:
            time.sleep(pause_s)
    return read()

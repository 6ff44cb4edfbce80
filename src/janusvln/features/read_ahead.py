"""Features read ahead of the training step, by threads of the training process.

    announced keys ──> reader threads: pread into a reused buffer, checksum ──> copy to the device
                                                                       (on a stream of its own; int8 is decoded there)

Features do not go through DataLoader workers: sent through torch's queue they arrive about ten times more
slowly than threads read them here. Reading and hashing release the interpreter lock.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from vggt_cache.codec import INT8
from vggt_cache.codec.base import Int8
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache
from vggt_cache.store.tensors import TORCH_DTYPES

T = TypeVar("T")
THREADS = 2
RETRY_PAUSES_S = (0.2, 1.0)
"""Between attempts at a read that the operating system refuses: a mount may only stumble."""

Arrived = tuple[Tensor | None, torch.cuda.Event | None]
"""The feature on the device, None where the key is not in the cache; when its copy is complete, None on a CPU."""


@dataclass(frozen=True, kw_only=True)
class PendingRead:
    buffer: Tensor
    """Host memory that the record is read into: the feature [h, w, C], or the bytes of one in int8."""
    result: Future[Arrived]


class ReadAhead:
    """Reads features of one cache onto one device. All methods are for the training thread.

    Host memory is used again and again, pinned where a GPU reads from it; never more than was in use at one time.
    """

    def __init__(self, cache: FeatureCache, device: torch.device, *, threads: int = THREADS) -> None:
        self.cache = cache
        self._device = device
        self._is_int8 = cache.spec.feature_dtype == INT8
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._free: defaultdict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        self._copying: deque[tuple[torch.cuda.Event, Tensor]] = deque()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="feature-reader")

    def start(self, key: bytes, grid: tuple[int, int]) -> PendingRead:
        """Begin to read the feature of a key, whose grid (h, w) is known from its frame."""
        while self._copying and self._copying[0][0].query():  # type: ignore[no-untyped-call]
            self._give_back(self._copying.popleft()[1])
        buffer = self._buffer(*grid)
        return PendingRead(buffer=buffer, result=self._threads.submit(self._read, key, buffer))

    def wait(self, read: PendingRead) -> Tensor | None:
        """The feature [h, w, C] on the device; None when the key is not in the cache.

        On a CPU it may lie in the read's buffer, and is valid until `release`. Raises what reading raised: a
        StoreError.
        """
        feature, copied = read.result.result()
        if feature is not None and copied is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(copied)
            feature.record_stream(current)
        return feature

    def settle(self, reads: Sequence[PendingRead]) -> None:
        """Return when all reads have ended, one way or another.

        Waking up once, and not for each of them, leaves the processors to the readers.
        """
        futures.wait([read.result for read in reads])

    def release(self, read: PendingRead) -> None:
        """The step that used the feature is over: its buffer may be used again."""
        copied = None
        if not read.result.cancel() and not read.result.exception():
            copied = read.result.result()[1]
        if copied is None:
            self._give_back(read.buffer)
        else:
            self._copying.append((copied, read.buffer))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _buffer(self, h: int, w: int) -> Tensor:
        spec = self.cache.spec
        shape, dtype = spec.shape((h, w)), TORCH_DTYPES[spec.feature_dtype]
        if self._is_int8:
            shape, dtype = (Int8().size_limits(h * w, spec.encoder.channels)[0],), torch.uint8
        free = self._free[shape]
        return free.pop() if free else torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)

    def _give_back(self, buffer: Tensor) -> None:
        self._free[tuple(buffer.shape)].append(buffer)

    def _read(self, key: bytes, buffer: Tensor) -> Arrived:
        """In the threads."""
        send: Callable[[torch.device], Tensor] | None = None
        if self._is_int8:
            if (encoded := with_retries(lambda: self.cache.get_encoded(key, out=buffer))) is not None:
                send = encoded.decode_on
        elif (feature := with_retries(lambda: self.cache.get_by_key(key, out=buffer))) is not None:
            send = partial(feature.to, non_blocking=True)
        if send is None:
            return None, None
        if self._stream is None:
            return send(self._device), None
        with torch.cuda.stream(self._stream):
            return send(self._device), self._stream.record_event()


def with_retries(read: Callable[[], T]) -> T:
    """Call `read` again after a pause where the operating system refused, a bounded number of times."""
    for pause_s in RETRY_PAUSES_S:
        try:
            return read()
        except CacheAccessError:
            time.sleep(pause_s)
    return read()

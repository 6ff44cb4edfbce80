"""Features on the device one batch ahead of the training step, read by threads of the training process.

    announced keys or frames ──> reader threads: pread into a reused buffer, checksum ──> copy to the device
                                                                  (on a stream of its own; int8 is decoded there)

`Delivery` is for any trainer; `ReadAhead` is what it stands on. Features do not go through DataLoader workers: sent
through torch's queue they arrive about ten times more slowly than threads read them here. Reading and hashing release
the interpreter lock.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from vggt_cache.codec import INT8
from vggt_cache.codec.base import Int8
from vggt_cache.errors import CacheAccessError, MissingFeatureError, SettingsError
from vggt_cache.identity import KEY_BYTES
from vggt_cache.store import FeatureCache
from vggt_cache.store.record import Record, shape_of
from vggt_cache.store.tensors import TORCH_DTYPES, at_a_page

T = TypeVar("T")
THREADS = 2
RETRY_PAUSES_S = (0.2, 1.0)
"""Between attempts at a read that the operating system refuses: a mount may only stumble."""
Key = bytes | Callable[[], bytes]
"""16 bytes, or what finds them, such as by reading and hashing image files."""


class Arrived(NamedTuple):
    """What became of a read; all None where the key is not in the cache."""

    feature: Tensor | None = None
    """On the device."""
    copied: torch.cuda.Event | None = None
    """When the copy to a GPU is complete."""
    buffer: Tensor | None = None
    """Host memory that the record was read into: the feature, or the bytes of one in int8."""


@dataclass(frozen=True, kw_only=True)
class PendingRead:
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
        self._lock = threading.Lock()
        """Held while buffers are taken and given back."""
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="feature-reader")

    def start(self, key: Key) -> PendingRead:
        """Begin to read the feature of a key."""
        return PendingRead(result=self._threads.submit(self._read, key))

    def wait(self, read: PendingRead) -> Tensor | None:
        """The feature (FeatureSpec.shape) on the device; None when the key is not in the cache.

        On a CPU it may lie in the read's buffer, and is valid until `release`. Raises what reading raised: a
        StoreError, or the error of finding the key.
        """
        feature, copied, _ = read.result.result()
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
        if read.result.cancel() or read.result.exception():
            return
        _, copied, buffer = read.result.result()
        if buffer is not None:
            with self._lock:
                if copied is None:
                    self._give_back(buffer)
                else:
                    self._copying.append((copied, buffer))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _give_back(self, buffer: Tensor) -> None:
        self._free[tuple(buffer.shape)].append(buffer)

    # ------------------------------------------------------------ in the threads

    def _read(self, key: Key) -> Arrived:
        found = key if isinstance(key, bytes) else key()
        record = self.cache.record_of(found)
        buffer = None if record is None else self._buffer(record)
        try:
            feature, copied = self._read_into(buffer, found)
        except BaseException:
            if buffer is not None:
                with self._lock:
                    self._give_back(buffer)
            raise
        return Arrived(feature, copied, buffer)

    def _buffer(self, record: Record) -> Tensor:
        spec = self.cache.spec
        shape = shape_of(spec, record.h, record.w, record.frames)
        dtype = TORCH_DTYPES[spec.feature_dtype]
        if self._is_int8:
            shape = Int8().size_limits(math.prod(shape[:-1]), spec.encoder.channels)[:1]
            dtype = torch.uint8
        with self._lock:
            while self._copying and self._copying[0][0].query():  # type: ignore[no-untyped-call]
                self._give_back(self._copying.popleft()[1])
            if self._free[shape]:
                return self._free[shape].pop()
        if self._stream is None:
            return at_a_page(shape, dtype)
        return torch.empty(shape, dtype=dtype, pin_memory=True, device="cpu")  # which begins at a page too

    def _read_into(self, buffer: Tensor | None, key: bytes) -> tuple[Tensor | None, torch.cuda.Event | None]:
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


# ---------------------------------------------------------------- for any trainer

Batch = Mapping[str, Any]
Wanted = Sequence[Any]
"""Of a batch, one for each feature: a key, or an ordered list of frames as `FeatureCache.get` takes it."""


class Delivery:
    """Puts into each batch the features of its frames, on a device, having read them while the batch before was used.

        delivery = Delivery(FeatureCache.open("cache", context="causal"), "cuda")
        for batch in delivery.ahead(loader):
            loss = model(**batch)  # batch["frames"] has become batch["features"], a list of tensors [h, w, C]

    A feature is the caller's own. One object serves one thread, loader after loader.
    """

    def __init__(
        self,
        cache: FeatureCache,
        device: torch.device | str,
        *,
        frames: str = "frames",
        features: str = "features",
        miss: Callable[[Wanted], Sequence[Tensor]] | None = None,
        threads: int = THREADS,
    ) -> None:
        """`frames`: the entry of a batch that says which features it needs, a sequence with one ordered frame list for
        each (read and hashed by the threads here), or with one key for each, if the DataLoader's workers have called
        `cache.key_of`. `features`: the entry that takes its place. `miss`: makes, on the device, the features of those
        which the cache does not have; without it they raise MissingFeatureError.
        """
        self.cache, self.device = cache, torch.device(device)
        self._frames, self._features, self._miss = frames, features, miss
        self._reader = ReadAhead(cache, self.device, threads=threads)
        self._ahead: _Ahead | None = None

    def ahead(self, batches: Iterable[Batch]) -> Iterator[dict[str, Any]]:
        """The batches of a loader with their features. Asked again for the same iterator, it goes on where it was.

        Raises SettingsError for a batch of another form, MissingFeatureError, FrameError and StoreErrors.
        """
        is_iterator = isinstance(batches, Iterator)
        if not (is_iterator and self._ahead is not None and self._ahead.source is batches):
            if self._ahead is not None:
                self._ahead.forget()
            self._ahead = _Ahead(self, batches)
        return self._ahead

    def deliver(self, batch: Batch) -> dict[str, Any]:
        """One batch with its features, not read ahead. A batch that needs none, or has them, stays as it is."""
        return self._finish(*self._begin(batch))

    def close(self) -> None:
        """End the threads. The cache stays open."""
        self._reader.close()

    def _begin(self, batch: Batch) -> tuple[dict[str, Any], list[PendingRead]]:
        if not isinstance(batch, Mapping):
            raise SettingsError(
                f"a batch is of type {type(batch).__name__}, and one with named entries is needed, of which "
                f"{self._frames!r} says which features it needs: have the collate function return a dict"
            )
        return dict(batch), [self._start(one) for one in batch.get(self._frames, ())]

    def _start(self, wanted: Any) -> PendingRead:
        is_key = isinstance(wanted, bytes) and len(wanted) == KEY_BYTES
        return self._reader.start(wanted if is_key else partial(self.cache.key_of, wanted))

    def _finish(self, batch: dict[str, Any], reads: list[PendingRead]) -> dict[str, Any]:
        if self._frames not in batch:
            return batch
        wanted = batch.pop(self._frames)
        self._reader.settle(reads)
        try:
            found = [self._reader.wait(read) for read in reads]
            if self.device.type == "cpu":  # else a copy already
                found = [None if feature is None else feature.clone() for feature in found]
        finally:
            self._forget(reads)
        missing = [at for at, feature in enumerate(found) if feature is None]
        if missing:
            if self._miss is None:
                raise MissingFeatureError(
                    f"the feature of {str(wanted[missing[0]])[:200]} is not in {self.cache.cache_dir} (and "
                    f"{len(missing) - 1} more of this batch): precompute it, or give miss=, a function that computes it"
                )
            for at, feature in zip(missing, self._miss([wanted[at] for at in missing]), strict=True):
                found[at] = feature
        return {**batch, self._features: found}

    def _forget(self, reads: Iterable[PendingRead]) -> None:
        for read in reads:
            self._reader.release(read)


class _Ahead(Iterator[dict[str, Any]]):
    """Takes each batch from the loader one before it is asked for; the first when it is first asked."""

    def __init__(self, delivery: Delivery, batches: Iterable[Batch]) -> None:
        self.source = batches
        self._delivery = delivery
        self._batches = iter(batches)
        self._next: tuple[dict[str, Any], list[PendingRead]] | None = None
        self._began = False

    def __next__(self) -> dict[str, Any]:
        if not self._began:
            self._began, self._next = True, self._pull()
        if self._next is None:
            raise StopIteration
        batch, self._next = self._next, None
        self._next = self._pull()
        return self._delivery._finish(*batch)

    def forget(self) -> None:
        """What was announced will not be taken: an epoch ended early."""
        if self._next is not None:
            self._delivery._reader.settle(self._next[1])
            self._delivery._forget(self._next[1])
            self._next = None

    def _pull(self) -> tuple[dict[str, Any], list[PendingRead]] | None:
        batch = next(self._batches, None)
        return None if batch is None else self._delivery._begin(batch)

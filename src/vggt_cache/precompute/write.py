"""Features on their way from the device to the disk, in shards.

    encoder's thread ──> feature-writer ──> shard-committer
     check, pack         copy, write        fsync, name, done

The encoder never waits for the disk, and the writing of features never for an fsync: a batch, or a shard that is due,
is handed over, unless several wait already. A block of work counts as done only when all of its features are in
committed shards. Shards are committed in the order in which they were begun, so that is so once the last of them is.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch

from vggt_cache.codec import INT8
from vggt_cache.codec.quantise import quantised
from vggt_cache.errors import OutOfMemoryError, SettingsError
from vggt_cache.precompute.encode import is_out_of_memory
from vggt_cache.store import ShardWriter
from vggt_cache.store.worker import Job, Worker

SHARD_SECONDS = 60.0
"""A shard is handed over to be committed when it is this old, or has grown to `shard_bytes()`."""
_WAITING_BATCHES = 4
_WAITING_SHARDS = 1
"""Beside the one that is being committed and the one that is open: what a crash can lose at most is these three."""


@dataclass(kw_only=True)
class FeatureWriter:
    """Owns the open shard. All that is called here raises what went wrong in the threads.

    After an error nothing more is written or begun. What was handed over to be committed before a feature could not be
    written is still committed; behind a shard that could not be committed none is.
    """

    new_shard: Callable[[], ShardWriter]
    feature_dtype: str
    shard_bytes: int
    on_bad_feature: Callable[[str, str], object]
    """Called with label and reason, in the writing thread, as is the next with a number of features."""
    on_written: Callable[[int], object] = lambda count: None
    committed: int = 0
    """Features on disk, written by this process."""

    def __post_init__(self) -> None:
        self._shard: ShardWriter | None = None
        self._shard_opened_s = 0.0
        self._when_committed: list[Job] = []
        self._committing = Worker("shard-committer", waiting=_WAITING_SHARDS)
        look_at_age = partial(self._turn, lambda: None)
        self._writing = Worker("feature-writer", waiting=_WAITING_BATCHES, when_idle=look_at_age)

    def put(self, keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor) -> None:
        """Store features [len(keys), ...] (FeatureSpec.shape) from any device.

        They are in the dtype of storage (of int8: bfloat16). `labels` name them in messages. Those that are not finite
        are reported and left out.
        """
        try:
            batch = Outgoing(keys, labels, features, self.feature_dtype)
        except RuntimeError as error:
            _raise(error)
        self._submit(lambda: self._write(batch))

    def when_committed(self, job: Job) -> None:
        """Do this, in the committing thread, as soon as all that was `put` so far is on disk."""
        self._submit(lambda: self._when_committed.append(job))

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        done = threading.Event()
        self.when_committed(done.set)
        self._submit(self._hand_over)
        while not done.wait(0.1):
            self._raise_error()

    def close(self) -> None:
        """Commit, and end the threads."""
        self._writing.submit(partial(self._turn, self._hand_over))
        self._writing.close()
        self._committing.close()
        self._raise_error()

    def _submit(self, job: Job) -> None:
        self._raise_error()
        self._writing.submit(partial(self._turn, job))

    @property
    def _error(self) -> BaseException | None:
        return self._committing.error or self._writing.error

    def _raise_error(self) -> None:
        if self._error is not None:
            _raise(self._error)

    # ------------------------------------------------------------ in the writing thread

    def _turn(self, job: Job) -> None:
        """A job, then what is due. After an error jobs are dropped, and so is the open shard."""
        if self._error is not None:
            if self._shard is not None:
                self._shard.abort()
            self._shard = None
            return
        job()
        if self._shard is not None:
            age_s = time.monotonic() - self._shard_opened_s
            if self._shard.bytes_written >= self.shard_bytes or age_s >= SHARD_SECONDS:
                self._hand_over()

    def _write(self, batch: Outgoing) -> None:
        stored, finite = batch.on_host()
        for key, label, values, is_finite in zip(batch.keys, batch.labels, stored, finite, strict=True):
            if not is_finite:
                dtype = str(batch.dtype).removeprefix("torch.")
                self.on_bad_feature(label, f"its feature is not finite in {dtype}, so it is not stored")
                continue
            if self._shard is None:
                self._shard, self._shard_opened_s = self.new_shard(), time.monotonic()
            if self.feature_dtype == INT8:
                self._shard.append_record(key, batch.shape, values)
            else:
                self._shard.append(key, values)
            self.on_written(1)
            if self._shard.is_full:
                self._hand_over()

    def _hand_over(self) -> None:
        """The open shard, and what waits for it, go to the committing thread; the next shard begins at once."""
        job = partial(self._commit, self._shard, self._when_committed)
        self._when_committed = []
        # Should the handing over itself fail, for want of memory, nobody could tell whose the shard is: it is left as a
        # temporary file then, as a killed process leaves it.
        self._shard = None
        self._committing.submit(job)

    # ------------------------------------------------------------ in the committing thread

    def _commit(self, shard: ShardWriter | None, when_committed: Sequence[Job]) -> None:
        if self._committing.error is not None:
            # A shard before this one is not on the disk, and a block that ends here may have features in that.
            if shard is not None:
                shard.abort()
            return
        if shard is not None:
            shard.commit()
            self.committed += shard.record_count
        for job in when_committed:
            job()


def _raise(error: BaseException) -> NoReturn:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        raise OutOfMemoryError(
            "no memory is left for the features that are on their way to the disk: what is committed stays; free some "
            "(nvidia-smi and free show who holds it), or use a smaller --batch_size, and run the same command again"
        ) from error
    raise error


# ---------------------------------------------------------------- from the device to the host


class Outgoing:
    """A batch that lies where it was computed; nothing of it needs to be complete there yet."""

    def __init__(
        self, keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor, feature_dtype: str
    ) -> None:
        """Of features [n, ...] (FeatureSpec.shape) in the dtype of storage (of int8: bfloat16), on any device.

        To be made where they are computed: what is done to them is queued behind that, and nothing waits for it.
        """
        self.keys, self.labels = keys, labels
        self.shape = features.shape[1:]
        self.dtype = features.dtype
        """Of the features, also where they are packed already."""
        packed = feature_dtype == INT8
        self.stored, self.finite = _packed(features) if packed else (features, all_finite(features))
        """[n, ...] in the dtype of storage; of int8 the records, uint8 [n, bytes]. bool [n]: all values are"""
        self._ready: torch.cuda.Event | None = None
        if features.device.type == "cuda":
            # The stream of the features' own device: the current device may be another one.
            self._ready = torch.cuda.current_stream(features.device).record_event()

    def on_host(self) -> tuple[torch.Tensor, list[bool]]:
        """`stored` and `finite` in host memory, copied on a stream of its own, beside the encoder's next batch."""
        if self._ready is None:
            return self.stored, self.finite.tolist()
        stream = torch.cuda.Stream(self.stored.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            # Copies that do not block go into pinned memory, which torch keeps for the next one.
            stored, finite = (one.to("cpu", non_blocking=True) for one in (self.stored, self.finite))
        stream.synchronize()
        return stored, finite.tolist()


def all_finite(features: torch.Tensor) -> torch.Tensor:
    """bool [n] on the features' device: whether no value of a feature is NaN or infinite.

    The least and the largest value tell: both are NaN where any is. That reads every value once and keeps nothing,
    a fraction of what `isfinite` of all of them costs. A sum would not do: of float16 it overflows by itself.
    """
    ends = torch.stack([torch.stack(feature.aminmax()) for feature in features])
    return ends.isfinite().all(dim=1)


def _packed(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 records, and whether what they were made from is finite: half of the bytes travel."""
    if features.dtype != torch.bfloat16:
        raise SettingsError(f"features of {features.dtype} are not packed in int8: give torch.bfloat16")
    # One at a time: float32 copies are large.
    records, finite = zip(*(quantised(feature.flatten(0, -2)) for feature in features), strict=True)
    return torch.stack(records), torch.stack(finite)

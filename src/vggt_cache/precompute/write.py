"""The threads that take features off the device and bring them to the disk in shards.

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
from vggt_cache.environment import size_of
from vggt_cache.errors import OutOfMemoryError
from vggt_cache.precompute.encode import is_out_of_memory
from vggt_cache.precompute.outgoing import HostCopy, Outgoing, outgoing
from vggt_cache.precompute.worker import Job, Worker
from vggt_cache.store import ShardWriter
from vggt_cache.store.tensors import bytes_of

DEFAULT_SHARD_BYTES = 256 * 1024 * 1024
SHARD_SECONDS = 60.0
"""A shard is handed over to be committed when it is this old, or has grown to `shard_bytes()`."""
_WAITING_BATCHES = 4
_WAITING_SHARDS = 1
"""Beside the one that is being committed and the one that is open: what a crash can lose at most is these three."""


def shard_bytes() -> int:
    """How large a shard grows, as the environment's VGGT_CACHE_SHARD_BYTES says. Raises SettingsError."""
    return size_of("VGGT_CACHE_SHARD_BYTES", DEFAULT_SHARD_BYTES)


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """All features of a block have been handed over."""

    block_id: str
    rows: Sequence[tuple[bytes, bytes]]
    """(state hash, digest) of the files that were read for it"""


class FeatureWriter:
    """Owns the open shard. `put`, `finish_block`, `flush` and `close` raise what went wrong in the threads.

    After an error nothing more is written or begun. What was handed over to be committed before a feature could not be
    written is still committed; behind a shard that could not be committed none is.
    """

    def __init__(
        self,
        new_shard: Callable[[], ShardWriter],
        *,
        feature_dtype: str,
        shard_bytes: int,
        on_commit: Callable[[list[BlockDone]], None],
        on_written: Callable[[int], object],
        on_bad_feature: Callable[[str, str], None],
    ) -> None:
        """`on_commit` is called in the committing thread, behind each commit, the other two in the writing thread."""
        self._new_shard = new_shard
        self._feature_dtype = feature_dtype
        self._shard_bytes = shard_bytes
        self._on_commit = on_commit
        self._on_written = on_written
        self._on_bad_feature = on_bad_feature
        self._shard: ShardWriter | None = None
        self._shard_opened_s = 0.0
        self._finished: list[BlockDone] = []
        self._host_copy = HostCopy()
        self.committed = 0
        """Features on disk, written by this process."""
        self._committing = Worker("shard-committer", waiting=_WAITING_SHARDS)
        self._writing = Worker(
            "feature-writer", waiting=_WAITING_BATCHES, when_idle=partial(self._turn, _nothing)
        )

    def put(self, keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor) -> None:
        """Store features [len(keys), h, w, C], in the dtype of storage (of int8: bfloat16), from any device.

        `labels` name them in messages. Those that are not finite are reported and left out.
        """
        self._raise_error()
        try:
            batch = outgoing(keys, labels, features, self._feature_dtype)
        except RuntimeError as error:
            _raise(error)
        self._submit(lambda: self._write(batch))

    def finish_block(self, block: BlockDone) -> None:
        """Everything of this block has been `put`; it is done once that is committed."""
        self._submit(lambda: self._finished.append(block))

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        done = threading.Event()
        self._submit(lambda: self._hand_over(done.set))
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
        if (error := self._error) is not None:
            _raise(error)

    # ------------------------------------------------------------ in the writing thread

    def _turn(self, job: Job) -> None:
        """A job, then what is due. After an error jobs are dropped, and so is the open shard."""
        if self._error is not None:
            if self._shard is not None:
                self._shard.abort()
            self._shard = None
            return
        job()
        if self._shard_is_due():
            self._hand_over()

    def _write(self, batch: Outgoing) -> None:
        stored, finite = self._host_copy.fetch(batch)
        for key, label, values, is_finite in zip(batch.keys, batch.labels, stored, finite, strict=True):
            if not is_finite:
                dtype = str(batch.dtype).removeprefix("torch.")
                self._on_bad_feature(label, f"its feature is not finite in {dtype}, so it is not stored")
                continue
            if self._shard is None:
                self._shard, self._shard_opened_s = self._new_shard(), time.monotonic()
            if self._feature_dtype == INT8:
                self._shard.append_stored(key, *batch.grid, bytes_of(values))
            else:
                self._shard.append(key, values)
            self._on_written(1)
            if self._shard.is_full:
                self._hand_over()

    def _shard_is_due(self) -> bool:
        if self._shard is None:
            return False
        age_s = time.monotonic() - self._shard_opened_s
        return self._shard.bytes_written >= self._shard_bytes or age_s >= SHARD_SECONDS

    def _hand_over(self, then: Job | None = None) -> None:
        """The open shard, and the blocks that end in it, go to the committing thread; the next shard begins at once."""
        job = partial(self._commit, self._shard, self._finished, then)
        self._finished = []
        # Should the handing over itself fail, for want of memory, nobody could tell whose the shard is: it is left as a
        # temporary file then, as a killed process leaves it.
        self._shard = None
        self._committing.submit(job)

    # ------------------------------------------------------------ in the committing thread

    def _commit(self, shard: ShardWriter | None, finished: list[BlockDone], then: Job | None) -> None:
        if self._committing.error is not None:
            # A shard before this one is not on the disk, and a block that ends here may have features in that.
            if shard is not None:
                shard.abort()
            return
        if shard is not None:
            shard.commit()
            self.committed += shard.record_count
        self._on_commit(finished)
        if then is not None:
            then()


def _raise(error: BaseException) -> NoReturn:
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        raise OutOfMemoryError(
            "no memory is left for the features that are on their way to the disk: what is committed stays; free some "
            "(nvidia-smi and free show who holds it), or use a smaller --batch_size, and run the same command again"
        ) from error
    raise error


def _nothing() -> None:
    """What is done when there was nothing to do for a while: a look at the age of the shard."""

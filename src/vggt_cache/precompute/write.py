"""The thread that takes features off the device, checks them and commits them in shards.

The encoder never waits for the disk: it hands a batch over and goes on, unless several batches already
wait here. A block of work counts as done only when all of its features are in a committed shard.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from vggt_cache.store import ShardWriter

SHARD_BYTES = int(os.environ.get("VGGT_CACHE_SHARD_BYTES", 256 * 1024 * 1024))
"""A shard is committed when it has grown to this size, or is this old: what a crash can lose at most."""
SHARD_SECONDS = 60.0
_WAITING_BATCHES = 4


@dataclass(frozen=True, kw_only=True)
class BlockDone:
    """All features of a block have been handed over."""

    block_id: str
    rows: Sequence[tuple[bytes, bytes]]
    """(signature, digest) of the files that were read for it"""


class FeatureWriter:
    """Owns the open shard. `put`, `finish_block`, `flush` and `close` raise what went wrong in the thread."""

    def __init__(
        self,
        new_shard: Callable[[], ShardWriter],
        *,
        on_commit: Callable[[list[BlockDone]], None],
        on_written: Callable[[int], object],
        on_bad_feature: Callable[[str, str], None],
    ) -> None:
        self._new_shard = new_shard
        self._on_commit = on_commit
        self._on_written = on_written
        self._on_bad_feature = on_bad_feature
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(_WAITING_BATCHES)
        self._shard: ShardWriter | None = None
        self._shard_opened_s = 0.0
        self._finished: list[BlockDone] = []
        self._host_copy = _HostCopy()
        self._error: BaseException | None = None
        self.committed = 0
        """Features on disk, written by this process."""
        self._thread = threading.Thread(target=self._run, name="feature-writer", daemon=True)
        self._thread.start()

    def put(self, keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor) -> None:
        """Store features [len(keys), h, w, C], in the dtype of storage, from any device.

        `labels` name them in messages.
        """
        ready = self._host_copy.mark(features)
        self._submit(lambda: self._write(keys, labels, self._host_copy.fetch(features, ready)))

    def finish_block(self, block: BlockDone) -> None:
        """Everything of this block has been `put`; it is done once that is committed."""
        self._submit(lambda: self._finished.append(block))

    def flush(self) -> None:
        """Commit all that was handed over; returns when it is on disk."""
        done = threading.Event()
        self._submit(self._commit)
        self._submit(done.set)
        while not done.wait(0.1):
            self._raise_error()

    def close(self) -> None:
        """Commit, and end the thread."""
        self._jobs.put(self._commit)
        self._jobs.put(None)
        self._thread.join()
        self._raise_error()

    def _submit(self, job: Callable[[], None]) -> None:
        self._raise_error()
        self._jobs.put(job)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # ------------------------------------------------------------ in the thread

    def _run(self) -> None:
        """After an error jobs are taken and dropped, so that nobody waits for a place in the queue."""
        while True:
            try:
                try:
                    job = self._jobs.get(timeout=1.0)
                except queue.Empty:
                    job = _nothing
                if job is None:
                    return
                if self._error is None:
                    job()
                    if self._shard_is_due():
                        self._commit()
            except BaseException as error:  # also of the queue itself, which can run out of memory
                self._error = self._error or error
                self._abort()

    def _write(self, keys: Sequence[bytes], labels: Sequence[str], features: torch.Tensor) -> None:
        for key, label, feature in zip(keys, labels, features, strict=True):
            if not bool(torch.isfinite(feature).all()):
                dtype = str(feature.dtype).removeprefix("torch.")
                self._on_bad_feature(label, f"its feature is not finite in {dtype}, so it is not stored")
                continue
            if self._shard is None:
                self._shard, self._shard_opened_s = self._new_shard(), time.monotonic()
            self._shard.append(key, feature)
            self._on_written(1)
            if self._shard.is_full:
                self._commit()

    def _shard_is_due(self) -> bool:
        if self._shard is None:
            return False
        age_s = time.monotonic() - self._shard_opened_s
        return self._shard.bytes_written >= SHARD_BYTES or age_s >= SHARD_SECONDS

    def _commit(self) -> None:
        if self._shard is not None:
            shard, self._shard = self._shard, None
            shard.commit()
            self.committed += shard.record_count
        finished, self._finished = self._finished, []
        self._on_commit(finished)

    def _abort(self) -> None:
        if self._shard is not None:
            self._shard.abort()
            self._shard = None


class _HostCopy:
    """Copies features to the host on a stream of its own, beside the encoder's next batch."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pinned = torch.empty(0)

    def mark(self, features: torch.Tensor) -> torch.cuda.Event | None:
        """The moment from which `features` are complete on the device. Called where they are computed."""
        if features.device.type != "cuda":
            return None
        # The stream of the features' own device: the current device may be another one.
        ready: torch.cuda.Event = torch.cuda.current_stream(features.device).record_event()
        return ready

    def fetch(self, features: torch.Tensor, ready: torch.cuda.Event | None) -> torch.Tensor:
        """The features in host memory, valid until the next call."""
        if ready is None:
            return features
        if self._stream is None:
            self._stream = torch.cuda.Stream(features.device)  # type: ignore[no-untyped-call]
        if self._pinned.dtype != features.dtype or self._pinned.numel() < features.numel():
            self._pinned = torch.empty(features.numel(), dtype=features.dtype, pin_memory=True)
        host = self._pinned[: features.numel()].view(features.shape)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            host.copy_(features, non_blocking=True)
        self._stream.synchronize()
        return host


def _nothing() -> None:
    """What the thread does when it has waited long enough to look at the age of its shard."""

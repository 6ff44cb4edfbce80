"""What a cache was asked for is kept on this machine, so that the next epoch finds it here.

A reader that had to go to the cache hands over a copy of the record's bytes and goes on; a thread writes them. Reading
never waits for the local disk, and never fails for it: what comes faster than it can be written is left for the next
epoch, and behind the first thing that cannot be written nothing more is kept, with one warning.
"""

from __future__ import annotations

import atexit
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from vggt_cache.errors import VggtCacheError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.record import Record
from vggt_cache.store.shards import OpenShard
from vggt_cache.store.staged import COMMIT_S, StagedRecords, Staging
from vggt_cache.store.worker import Job, Worker

T = TypeVar("T")
_WAITING_BYTES = 64 * 1024 * 1024
"""So much may wait to be written, or one record."""
_LOCAL_TROUBLE = (VggtCacheError, OSError, MemoryError, RuntimeError)
"""The last one: no thread can be started."""


class ReadThrough:
    """The records of one store on this machine, for a cache that reads. For any thread."""

    def __init__(self, staging: Staging, spec: FeatureSpec) -> None:
        self.records: StagedRecords | None = None
        """None where the local directory cannot be used."""
        self._gave_up = self._closed = False
        self._start_anew()
        try:
            self.records = StagedRecords(staging, spec)
        except _LOCAL_TROUBLE as error:
            self._give_up(error)

    def _start_anew(self) -> None:
        self.lock = threading.Lock()
        """Held while it is decided whether a record is taken."""
        self._worker: Worker | None = None
        self._waiting: dict[bytes, int] = {}
        """Keys of the records that wait to be written, and their bytes."""
        self._is_full = False
        self._look_again_s = 0.0
        """When others may have made room, or committed what is found from then on."""

    def start_anew_in_child(self) -> None:
        """After fork: the thread, and what it had to write, are the parent's."""
        self._start_anew()
        if self.records is not None:
            self.records.start_anew_in_child()

    def read(self, record: Record, use: Callable[[OpenShard, Record], T]) -> T | None:
        """What `use` makes of the local copy of a record of the cache; None where there is none."""
        return None if self.records is None else self.records.read(record, use)

    def keep(self, record: Record, stored: memoryview) -> None:
        """A record of the cache was read, and checked: have it written, unless as much waits already as may."""
        self._attempt(partial(self._hand_over, record, stored))

    def _hand_over(self, record: Record, stored: memoryview) -> None:
        with self.lock:
            if self._closed or record.key in self._waiting:
                return
            if self._is_full and time.monotonic() < self._look_again_s:
                return
            if self._waiting and sum(self._waiting.values()) + stored.nbytes > _WAITING_BYTES:
                return
            self._waiting[record.key] = stored.nbytes
            worker = self._worker or self._begin()
        copy = np.frombuffer(stored, np.uint8).copy()  # others go on meanwhile: numpy releases the lock
        worker.submit(partial(self._attempt, partial(self._write, record, copy.data)))

    def close(self, *, wait: bool = True) -> None:
        """Commit what was kept, and end the thread. Nothing may be read from here any more."""
        with self.lock:
            self._closed, worker, self._worker = True, self._worker, None
        if worker is None:
            self._close_records()
            return
        worker.submit(partial(self._attempt, self._commit))
        worker.submit(self._close_records)
        worker.close(wait=wait)

    def _begin(self) -> Worker:
        self._look_again_s = time.monotonic() + COMMIT_S
        self._worker = Worker("stage-writer", waiting=0, when_idle=self._look_around)
        atexit.register(_close_if_alive, weakref.ref(self))
        return self._worker

    # ------------------------------------------------------------ in the thread

    def _write(self, record: Record, stored: memoryview) -> None:
        assert self.records is not None
        try:
            self._is_full = not self.records.append(record, stored)
        finally:
            with self.lock:
                self._waiting.pop(record.key, None)
        self._look_around()

    def _look_around(self) -> None:
        """About once a minute, whatever else is done."""
        if time.monotonic() >= self._look_again_s:
            self._attempt(self._commit)

    def _commit(self) -> None:
        assert self.records is not None
        self._look_again_s = time.monotonic() + COMMIT_S
        self.records.commit()

    def _close_records(self) -> None:
        if self.records is not None:
            self.records.close()

    def _attempt(self, step: Job) -> None:
        if self._gave_up:
            return
        try:
            step()
        except _LOCAL_TROUBLE as error:
            self._give_up(error)

    def _give_up(self, error: BaseException) -> None:
        with self.lock:
            self._gave_up = True
            self._waiting.clear()
        warnings.warn(
            "from now on nothing more is staged here; what is staged is used, and all else is read from the cache: "
            f"{error}",
            stacklevel=2,
        )


def _close_if_alive(staged: weakref.ref[ReadThrough]) -> None:
    alive = staged()
    if alive is not None:
        alive.close()

"""A store as one process sees it: a snapshot, open shards, and what to do when the index proves wrong."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from vggt_cache.errors import CacheAccessError, CorruptRecordError, ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.derive import Deriver
from vggt_cache.store.filesystem import FileSystem
from vggt_cache.store.forks import renew_after_fork
from vggt_cache.store.index import IndexDamagedError
from vggt_cache.store.reader import ShardReader, ShardVanishedError
from vggt_cache.store.rows import Record
from vggt_cache.store.snapshot import Snapshot

T = TypeVar("T")


class StoreView:
    """Finds and reads records of one snapshot. Safe to use from several threads and after fork."""

    def __init__(
        self,
        cache_dir: str,
        spec: FeatureSpec,
        *,
        fs: FileSystem,
        names: Sequence[str] | None = None,
        use_index: bool = True,
    ) -> None:
        """`names`: exactly these shards, instead of those that are there now. Raises CacheAccessError."""
        store_dir = os.path.join(cache_dir, spec.short_name)
        self._use_index = use_index
        self._closed = False
        self._path = store_dir
        self._lock = threading.RLock()
        renew_after_fork(self)
        self._reader = ShardReader(store_dir, spec, fs=fs)
        self._deriver = Deriver(store_dir, spec, self._reader, fs)
        try:
            self._snapshot = (
                self._deriver.current(use_index=use_index) if names is None else self._deriver.exactly(names)
            )
        except BaseException:
            self._reader.close()
            raise

    @property
    def snapshot(self) -> Snapshot:
        return self._snapshot

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._reader.close()
            for level in self._snapshot.levels:
                level.index.close()

    def start_anew_in_child(self) -> None:
        self._lock = threading.RLock()

    # ------------------------------------------------------------ questions

    def find(self, key: bytes) -> list[tuple[str, Record]]:
        """Shard and record of every copy of this key, the winner first."""
        return self._ask(lambda snapshot: snapshot.find(key))

    def key_count(self) -> int:
        return self._ask(lambda snapshot: snapshot.key_count)

    def keys(self) -> Iterator[bytes]:
        """Every key of the present snapshot once, in order."""
        self._require_open()
        snapshot, last = self._snapshot, b""
        while True:
            try:
                for key in snapshot.keys(last):
                    last = key
                    yield key
                return
            except IndexDamagedError:
                self._require_open()
                snapshot = self._deriver.without_index(snapshot)

    def read(self, key: bytes, memory_for: Callable[[Record], memoryview]) -> bool:
        """Read the key's record, checked, into the memory that `memory_for` gives; False when it is absent.

        Raises CorruptRecordError, ShardFormatError, CacheAccessError, and what `memory_for` raises.
        """
        return self._first_copy(key, lambda shard, record: self._reader.read(shard, record, memory_for))

    def read_stored(self, key: bytes, memory_for: Callable[[Record, int], memoryview]) -> bool:
        """The same with the record's bytes as they lie in the file; `memory_for` is told how many these are."""

        def read(shard: str, record: Record) -> None:
            self._reader.read_stored(shard, record, lambda length: memory_for(record, length))

        return self._first_copy(key, read)

    def _first_copy(self, key: bytes, read: Callable[[str, Record], object]) -> bool:
        """Call `read` with the winner, or with an older copy where the winner's shard has vanished."""
        vanished = None
        for shard, record in self.find(key):
            try:
                read(shard, record)
                return True
            except ShardVanishedError as error:
                vanished = error  # an older copy of the same feature may still be there
            except CorruptRecordError:
                if not self._index_is_wrong(shard, record):
                    raise
                self._distrust_index(self._snapshot)
                return self._first_copy(key, read)
        if vanished is not None:
            raise vanished
        return False

    # ------------------------------------------------------------ changes

    def refresh(self) -> None:
        """Take in what was committed since."""
        self._require_open()
        with self._lock:
            before = self._snapshot
            after = self._deriver.current(before, use_index=self._use_index)
            if after.names != before.names:
                self._snapshot = after

    def save_index(self) -> bool:
        with self._lock:
            return self._ask(self._deriver.save)

    # ------------------------------------------------------------ steps

    def _ask(self, question: Callable[[Snapshot], T]) -> T:
        """The snapshot's answer, whatever has become of the index."""
        self._require_open()
        snapshot = self._snapshot
        try:
            return question(snapshot)
        except IndexDamagedError:
            return self._ask_again(question, snapshot)

    def _ask_again(self, question: Callable[[Snapshot], T], snapshot: Snapshot) -> T:
        """With the index that is saved now; where that proves damaged too, without one, from the shards."""
        try:
            return question(self._reopen_index(snapshot))
        except IndexDamagedError:
            return question(self._distrust_index(self._snapshot))

    def _reopen_index(self, snapshot: Snapshot) -> Snapshot:
        """Writers replace the index; on a network file system the old one, open here, may be gone with its name."""
        with self._lock:
            if self._snapshot is snapshot and self._use_index:
                self._snapshot = self._deriver.with_saved_index(snapshot)
            return self._snapshot

    def _index_is_wrong(self, shard: str, record: Record) -> bool:
        """Whether the shard itself tells something else about a record than the index did."""
        if not self._use_index:
            return False
        try:
            return record not in self._reader.header(shard).records
        except (ShardFormatError, CacheAccessError):
            return False

    def _distrust_index(self, snapshot: Snapshot) -> Snapshot:
        with self._lock:
            if self._snapshot is snapshot:
                self._use_index = False
                self._snapshot = self._deriver.without_index(snapshot)
            return self._snapshot

    def _require_open(self) -> None:
        if self._closed:
            raise CacheAccessError(f"the cache {self._path} was closed: open it again to read from it")

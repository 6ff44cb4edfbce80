"""Records of a cache that lie on a disk of this machine too: looked for here first, and never the only copy.

    vggt-cache stage ──┐
                       ├──> append ──> shards of an ordinary store in LOCAL_DIR, up to a limit in bytes
    reads of a cache ──┘

The bytes of a record are those of the cache, as its codec packed them. A local record stands for the one of the cache
that has the same key and the same checksum, and for no other, so what was computed again or converted there is not
served from here as it was before.

What comes first is kept, and nothing is evicted. An epoch reads every record once, in an order of its own, so a share
c of the records that stays gives a hit rate of c. With LRU a record that is read at u of one epoch (0 to 1) and at v of
the next is still there if what was read between them, 1 - u (1 - v) of all, is less than c: of all u and v that is
c + (1 - c) ln(1 - c), such as 0.15 where half of the records fit.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from vggt_cache.codec import NONE, coded_form
from vggt_cache.environment import bytes_in
from vggt_cache.errors import SettingsError, StoreError
from vggt_cache.identity import FeatureSpec
from vggt_cache.place import absolute, require_local
from vggt_cache.store.atomic_file import TEMP_NAME
from vggt_cache.store.directory import create_store
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem, accessing
from vggt_cache.store.format import reserved_header_bytes
from vggt_cache.store.inventory import dead_temp_files
from vggt_cache.store.record import Record
from vggt_cache.store.shards import SHARDS_FOLDER, OpenShard, ShardFolder, ShardVanishedError
from vggt_cache.store.snapshot import SnapshotTaker
from vggt_cache.store.writer import DEFAULT_MAX_RECORDS, ShardWriter, shard_bytes

T = TypeVar("T")
COMMIT_S = 60.0
"""A shard is committed when it is this old, or has grown to `shard_bytes()`: what a killed process loses at most."""
_KEPT_FREE = 0.1
"""Share of the file system that stays free where no limit is given: others use it too."""


@dataclass(frozen=True, kw_only=True)
class Staging:
    """Where records of a cache are kept on this machine, and how many bytes of them."""

    local_dir: str | os.PathLike[str]
    """Made where it is not there. All processes of the machine may share it, and all caches."""
    limit: int | str | None = None
    """Bytes of all that lies there, or a number with a unit, such as `2TB`; None: all but a tenth of its disk."""

    def __post_init__(self) -> None:
        require_local(self.local_dir, "the directory to stage into")
        if not os.fspath(self.local_dir):
            raise SettingsError("the directory to stage into is empty, so it names none: give one")
        if self.limit is not None and self.limit_bytes == 0:
            raise SettingsError(
                f"the limit of what is staged is {self.limit!r}, which is not a size: give bytes, or a number with a "
                "unit, as in 2TB"
            )

    @property
    def limit_bytes(self) -> int | None:
        return None if self.limit is None else bytes_in(str(self.limit))

    @property
    def path(self) -> str:
        return absolute(self.local_dir)

    def prepare(self, cache_dir: str, spec: FeatureSpec) -> None:
        """Make the store. Raises SettingsError where the directory is the cache itself, CommitError."""
        if os.path.realpath(self.path) == os.path.realpath(cache_dir):
            raise SettingsError(
                f"{self.path} is the cache itself, so nothing can be staged into it: give a directory on a disk of "
                "this machine"
            )
        create_store(self.path, spec)


class StagedRecords:
    """Those of one store. `read` and `has` are for any thread, all else for one.

    Any number of processes may write at once, each its own shards. The limit holds for all of them together: a shard
    that is being written counts as a full one. Those that begin one at the same moment do not see each other's, so at
    worst the limit is exceeded by `shard_bytes()` for each of them.
    """

    def __init__(self, staging: Staging, spec: FeatureSpec, *, fs: FileSystem = OPERATING_SYSTEM) -> None:
        """Makes the store where there is none. Raises CommitError, CacheAccessError."""
        self.staging, self.spec = staging, spec
        self._fs = fs
        self._store_dir = os.fspath(create_store(staging.path, spec, fs))
        self._remove_dead_files()
        self.shards = ShardFolder(self._store_dir, spec, fs=fs)
        self._taker = SnapshotTaker(self._store_dir, spec, self.shards)
        self._snapshot = self._taker.take()
        self._open: dict[str, tuple[ShardWriter, int]] = {}
        """By codec, the shard that is being written and how many bytes it may have."""
        self._appended: set[bytes] = set()
        """Keys of the records in these."""
        self._damaged: set[tuple[str, bytes]] = set()
        """Shard and key of copies that could not be read: as if they were not here."""
        self._told = self._committed = False

    def start_anew_in_child(self) -> None:
        """After fork: what the parent writes is its own."""
        self.shards.pool.start_anew_in_child()
        self._drop_open()

    # ------------------------------------------------------------ reading

    def read(self, record: Record, use: Callable[[OpenShard, Record], T]) -> T | None:
        """What `use` makes of the copy of this record of the cache; None where there is none that can be read."""
        for name, copy in self._copies(record):
            try:
                with self.shards.opened(name) as shard:
                    return use(shard, copy)
            except StoreError as error:
                if not self._told and not isinstance(error, ShardVanishedError):
                    self._told = True
                    warnings.warn(
                        "a staged record cannot be read, and is taken from the cache, as will be all others of this "
                        f"kind: {error}",
                        stacklevel=2,
                    )
                self._damaged.add((name, copy.key))
        return None

    def __len__(self) -> int:
        return self._snapshot.table.key_count

    def has(self, record: Record) -> bool:
        """Whether this record of the cache is here, as far as is known without reading it."""
        return any(True for _ in self._copies(record))

    def refresh(self) -> None:
        """Find what has been committed since, also by others. Raises CacheAccessError."""
        self.shards.reopen()
        self._snapshot = self._taker.take(self._snapshot)

    def _copies(self, record: Record) -> Iterator[tuple[str, Record]]:
        for name, copy in self._snapshot.table.find(record.key):
            if copy.checksum == record.checksum and (name, copy.key) not in self._damaged:
                yield name, copy

    # ------------------------------------------------------------ writing

    def append(self, record: Record, stored: memoryview) -> bool:
        """Keep a record of the cache, whose bytes were checked; False where there is no room for it.

        Raises CommitError, CacheAccessError; then what was not committed is lost.
        """
        if record.key in self._appended or self.has(record):
            return True
        codec = coded_form(self.spec.feature_dtype) if record.stored_bytes else NONE
        try:
            writer = self._writer_for(codec, stored.nbytes)
            if writer is None:
                return False
            writer.append_stored(record.key, record.h, record.w, stored, record.frames)
        except BaseException:
            self._drop_open()
            raise
        self._appended.add(record.key)
        return True

    def commit(self) -> None:
        """Bring all that was appended to the disk; it is found from now on. Raises CommitError, CacheAccessError."""
        try:
            while self._open:
                self._open.popitem()[1][0].commit()
                self._committed = True
        finally:
            self._drop_open()
        self.refresh()

    def close(self) -> None:
        """Forget what was not committed; leave an index of what was, so that the next process opens quickly."""
        self._drop_open()
        if self._committed:
            self._committed = False
            with suppress(StoreError):
                self._taker.save(self._snapshot)
        self.shards.close()

    def _writer_for(self, codec: str, stored_bytes: int) -> ShardWriter | None:
        """The open shard that takes so many bytes; None where there is no room for one."""
        writer, room = self._open.get(codec, (None, 0))
        if writer is not None and (
            writer.is_full
            or writer.bytes_written >= shard_bytes()
            or writer.file_bytes + stored_bytes > room
            or self._fs.clock_s() - writer.opened_s >= COMMIT_S
        ):
            self.commit()
            writer = None
        if writer is None:
            header = reserved_header_bytes(self.spec, DEFAULT_MAX_RECORDS, codec)
            room = self.room_bytes()
            if header + stored_bytes > room:
                return None
            writer = ShardWriter(self._store_dir, self.spec, codec=codec, fs=self._fs)
            self._open[codec] = writer, room
        return writer

    def _drop_open(self) -> None:
        for writer, _ in self._open.values():
            writer.abort()
        self._open.clear()
        self._appended.clear()

    # ------------------------------------------------------------ the limit

    def room_bytes(self) -> int:
        """What may still be written here by one process, with headers. Raises CacheAccessError."""
        files = self._files()
        written = sum(size for _, _, size in files)
        limit = self.staging.limit_bytes
        if limit is None:
            with accessing(self.staging.path):
                disk = shutil.disk_usage(self.staging.path)
            limit = written + disk.free - int(_KEPT_FREE * disk.total)
        growing = sum(max(0, shard_bytes() - size) for _, name, size in files if TEMP_NAME.fullmatch(name))
        return max(0, limit - written - growing)

    def place_bytes(self) -> int:
        """What lies here of this store, and what may still come. Raises CacheAccessError."""
        own = sum(size for store, _, size in self._files() if store == self.spec.short_name)
        return own + self.room_bytes()

    def _files(self) -> list[tuple[str, str, int]]:
        """Store, name and bytes of every file in a folder of shards, of all stores of the directory."""
        found = []
        with accessing(self.staging.path):
            for path in Path(self.staging.path).glob(f"*/{SHARDS_FOLDER}/*"):
                with suppress(FileNotFoundError):  # given its own name meanwhile, or removed
                    found.append((path.parent.parent.name, path.name, path.lstat().st_size))
        return found

    def _remove_dead_files(self) -> None:
        """What killed processes were writing: it would count as full shards for ever."""
        for folder, name, _ in dead_temp_files(self._store_dir, COMMIT_S, self._fs):
            with suppress(OSError):
                os.unlink(os.path.join(folder, name))

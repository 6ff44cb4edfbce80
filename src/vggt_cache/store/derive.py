"""From shards to a snapshot, and from a snapshot to a saved index."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress

import numpy as np

from vggt_cache.errors import ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.filesystem import FileSystem, is_regular, persist, release, write_fully
from vggt_cache.store.index import (
    FileSource,
    Index,
    IndexDamagedError,
    MemorySource,
    Source,
    build_index,
)
from vggt_cache.store.publish import PendingFile
from vggt_cache.store.reader import SHARD_NAME, ShardReader, ShardVanishedError
from vggt_cache.store.rows import ROW_BYTES, Rows, join_rows
from vggt_cache.store.snapshot import Level, Snapshot

INDEX_FOLDER = "index"
INDEX_FILE = "rows"
MAX_LISTINGS = 4
"""How often the store is listed when shards vanish meanwhile; a stale listing may go on to name them."""
MAX_IN_MEMORY_BYTES = 16 * 1024 * 1024
"""A larger supplement is kept in a nameless temporary file, so that a lost index does not cost memory per reader."""


class Deriver:
    """Makes snapshots of one store, and saves its index. Not for several threads at once."""

    def __init__(self, store_dir: str, spec: FeatureSpec, reader: ShardReader, fs: FileSystem) -> None:
        self._store_dir = store_dir
        self._spec = spec
        self._reader = reader
        self._fs = fs

    def current(self, previous: Snapshot | None = None, *, use_index: bool = True) -> Snapshot:
        """The store as it is now. Raises CacheAccessError.

        A shard that `previous` or the index knows and the listing lacks is looked for by its name: on a
        network file system a listing may be behind. A shard that was removed after the listing may have been
        superseded by one that the listing lacks, so then it is listed anew.
        """
        for _ in range(MAX_LISTINGS):
            names, index = self._names_now(previous, use_index)
            snapshot = self._derive(names, index, previous, gone_is_error=False)
            if len(snapshot.names) == len(names):
                break
        return snapshot

    def _names_now(self, previous: Snapshot | None, use_index: bool) -> tuple[list[str], Index | None]:
        index = self._base_index(previous) if use_index else None
        names = self._reader.names()
        known = set(previous.names) if previous is not None else set()
        if index is not None and index.names_text != "\n".join(names):
            known.update(filter(SHARD_NAME.fullmatch, index.names()))
        unlisted = [name for name in known.difference(names) if self._exists(name)]
        return sorted([*names, *unlisted]), index

    def exactly(self, names: Sequence[str]) -> Snapshot:
        """The snapshot of just these shards, in order. Raises CacheAccessError, also if one of them is gone."""
        return self._derive(list(names), self._base_index(None), None, gone_is_error=True)

    def with_saved_index(self, snapshot: Snapshot) -> Snapshot:
        """The same shards as in `snapshot`, with the index that is saved now; those that are gone are left out.

        Raises IndexDamagedError, CacheAccessError.
        """
        return self._derive(list(snapshot.names), self._base_index(None), snapshot, gone_is_error=False)

    def without_index(self, snapshot: Snapshot) -> Snapshot:
        """The same shards as in `snapshot`, all read from their headers; those that are gone are left out."""
        return self._derive(list(snapshot.names), None, None, gone_is_error=False)

    def save(self, snapshot: Snapshot) -> bool:
        """Save an index of `snapshot` for all readers to come; False, with a warning, where that cannot be.

        An index only saves time, so failing to save it fails nothing else. Raises IndexDamagedError and
        CacheAccessError when the snapshot cannot be read.
        """
        if self._saved_index_covers(snapshot):
            return True
        covered = sorted(name for level in snapshot.levels for name in level.names())
        rows = snapshot.rows_in(covered)
        try:
            self._reader.sync_names()  # what the index lists must not be lost in a power failure
            self._write(build_index(rows, covered, self._spec.fingerprint))
        except OSError as error:
            warnings.warn(
                f"the index in {self._store_dir} could not be saved ({error}): nothing is lost, but opening this "
                "cache will read the header of every shard",
                stacklevel=3,
            )
            return False
        return True

    # ------------------------------------------------------------ snapshots

    def _derive(
        self, names: list[str], index: Index | None, previous: Snapshot | None, *, gone_is_error: bool
    ) -> Snapshot:
        base = None if index is None else Level.over(index, names)
        covered = frozenset(base.names()) if base is not None else frozenset()
        uncovered = [name for name in names if name not in covered]
        old = previous.supplement if previous is not None else None
        kept = set(uncovered).intersection(old.names() if old is not None else ())
        fresh, read, damaged, gone = self._read_headers(
            [n for n in uncovered if n not in kept], gone_is_error
        )
        table = sorted([*kept, *read])
        supplement = None
        if table:
            numbers = {name: number for number, name in enumerate(table)}
            if len(fresh):
                fresh["shard"] = np.array([numbers[name] for name in read], np.uint32)[fresh["shard"]]
            rows = join_rows([fresh, old.rows(numbers)]) if old is not None and kept else fresh
            supplement = Level(index=self._private_index(rows, table))
        return Snapshot(
            names=tuple(name for name in names if name not in gone),
            base=base,
            supplement=supplement,
            damaged=tuple(damaged),
        )

    def _read_headers(
        self, names: Iterable[str], gone_is_error: bool
    ) -> tuple[Rows, list[str], list[tuple[str, str]], set[str]]:
        """Rows of these shards (numbered by the second result), shards read, damaged with reason, and gone."""
        parts: list[Rows] = []
        read: list[str] = []
        damaged, gone = [], set()
        for name in names:
            try:
                rows = self._reader.header(name).rows
            except ShardFormatError as error:
                damaged.append((name, str(error)))
            except ShardVanishedError:
                if gone_is_error:
                    raise
                gone.add(name)
            else:
                rows["shard"] = len(read)
                parts.append(rows)
                read.append(name)
        return join_rows(parts), read, damaged, gone

    def _exists(self, name: str) -> bool:
        status = self._reader.status(name)
        return status is not None and is_regular(status)

    # ------------------------------------------------------------ indexes

    def _base_index(self, previous: Snapshot | None) -> Index | None:
        """The saved index; where there is none by now, the one that `previous` has open."""
        index = self._saved_index()
        if index is None and previous is not None and previous.base is not None:
            return previous.base.index
        return index

    def _saved_index(self) -> Index | None:
        try:
            folder = persist(
                self._fs.open_directory, os.path.join(self._store_dir, INDEX_FOLDER), follow=False
            )
            try:
                fd = persist(self._fs.open_file, INDEX_FILE, dir_fd=folder)
            finally:
                release(self._fs, folder)
            source = FileSource(self._fs, fd)
            try:
                return Index(source, self._spec.fingerprint)
            except IndexDamagedError:
                source.close()
                return None
        except OSError:
            return None  # whatever the reason, the shards have all that it could tell

    def _saved_index_covers(self, snapshot: Snapshot) -> bool:
        """Whether the saved index is intact, and covers this snapshot or a later one."""
        index = self._saved_index()
        if index is None:
            return False
        saved = set(filter(SHARD_NAME.fullmatch, index.names()))
        wanted = {name for level in snapshot.levels for name in level.names()}
        with suppress(IndexDamagedError):
            return wanted <= saved and all(map(self._exists, saved - wanted)) and index.check_all()
        return False

    def _private_index(self, rows: Rows, names: Sequence[str]) -> Index:
        """An index for this process alone."""
        head, data = build_index(rows, names, self._spec.fingerprint)
        source: Source | None = None
        if len(rows) * ROW_BYTES > MAX_IN_MEMORY_BYTES:
            source = self._scratch(head, data)
        return Index(source or MemorySource(head + data), self._spec.fingerprint)

    def _scratch(self, head: bytes, data: bytes) -> Source | None:
        try:
            fd = self._fs.scratch_file()
        except OSError:
            return None
        try:
            write_fully(self._fs, fd, head, 0)
            write_fully(self._fs, fd, data, len(head))
            return FileSource(self._fs, fd)
        except OSError:
            release(self._fs, fd)
            return None

    def _write(self, parts: tuple[bytes, bytes]) -> None:
        path = os.path.join(self._store_dir, INDEX_FOLDER)
        with suppress(FileExistsError):
            persist(self._fs.make_directory, path)
        folder = persist(self._fs.open_directory, path, follow=False)
        try:
            pending = PendingFile(self._fs, folder)
            try:
                offset = 0
                for part in parts:
                    pending.write(part, offset)
                    offset += len(part)
                pending.seal(read_only=False)
                pending.publish_over(INDEX_FILE)
            except BaseException:
                pending.discard()
                raise
        finally:
            release(self._fs, folder)

"""What a cache directory holds, for `vggt-cache info`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.derive import INDEX_FILE, INDEX_FOLDER
from vggt_cache.store.faults import access_error, accessing
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem, is_regular, persist, release
from vggt_cache.store.format import payload_bytes
from vggt_cache.store.layout import survey
from vggt_cache.store.publish import TEMP_NAME
from vggt_cache.store.reader import SHARDS_FOLDER, ShardReader
from vggt_cache.store.scan import Scan, scan_store

TEMP_MIN_AGE_S = 24 * 3600.0
"""A temporary file that was written to within this time may have a living writer."""


@dataclass(frozen=True, kw_only=True)
class StoreDescription:
    """One store of a cache directory. Sizes in bytes."""

    spec: FeatureSpec
    path: str
    entries: int
    """Different keys."""
    shards: int
    codecs: Mapping[str, int]
    """How many of the shards each codec packed; `none`: as they are."""
    stored_bytes: int
    """Bytes of all records, as they lie in the files."""
    raw_bytes: int
    """Bytes of the same features as they are given out."""
    disk_bytes: int
    """Shards, temporary files and index."""
    superseded_records: int
    """Records whose key a later shard has too; they are not served."""
    temp_files: int
    """Left behind by writers that died."""
    damaged_shards: tuple[tuple[str, str], ...]
    """Shards whose header cannot be used: name, and why."""
    indexed: bool
    reclaimable_bytes: int
    """What `prune` with damaged=True would remove at least: temporary files, superseded shards, unreadable shards."""


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """A whole cache directory."""

    cache_dir: str
    stores: tuple[StoreDescription, ...]
    unreadable: tuple[tuple[str, str], ...]
    """Folders named like a store whose specification cannot be read: name, and why."""


def describe(cache_dir: str | os.PathLike[str], fs: FileSystem = OPERATING_SYSTEM) -> CacheDescription:
    """Look through a cache directory. Modifies nothing; reads the header of every shard.

    Raises CacheNotFoundError, NotACacheError, CacheAccessError.
    """
    path = os.path.abspath(cache_dir)
    found = survey(path, fs)
    return CacheDescription(
        cache_dir=path,
        stores=tuple(_describe_store(path, spec, fs) for spec in found.specs),
        unreadable=tuple((name, str(error)) for name, error in found.unreadable),
    )


def _describe_store(cache_dir: str, spec: FeatureSpec, fs: FileSystem) -> StoreDescription:
    path = os.path.join(cache_dir, spec.short_name)
    reader = ShardReader(path, spec, fs=fs)
    try:
        scan = scan_store(reader)
    finally:
        reader.close()
    temps = list(dead_temp_files(path, TEMP_MIN_AGE_S, fs))
    index_bytes = _file_bytes(os.path.join(path, INDEX_FOLDER), INDEX_FILE, fs)
    entries = int(scan.served.sum())
    damaged_bytes = sum(shard.file_bytes for shard in scan.damaged)
    temp_bytes = sum(size for _, _, size in temps)
    raw, stored = _record_bytes(scan, spec)
    return StoreDescription(
        spec=spec,
        path=path,
        entries=entries,
        shards=len(scan.names) + len(scan.damaged),
        codecs=dict(sorted(Counter(scan.codecs).items())),
        stored_bytes=stored,
        raw_bytes=raw,
        disk_bytes=sum(scan.file_bytes) + damaged_bytes + temp_bytes + (index_bytes or 0),
        superseded_records=len(scan.rows) - entries,
        temp_files=len(temps),
        damaged_shards=tuple((shard.name, shard.reason) for shard in scan.damaged),
        indexed=index_bytes is not None,
        reclaimable_bytes=temp_bytes
        + sum(scan.file_bytes[number] for number in scan.superseded_shards())
        + sum(shard.file_bytes for shard in scan.damaged if not shard.foreign),
    )


def _record_bytes(scan: Scan, spec: FeatureSpec) -> tuple[int, int]:
    """Bytes of all features as they are given out, and as they lie in the files."""
    cells = scan.rows["h"].astype(np.int64) * scan.rows["w"]
    raw = cells * payload_bytes(spec, 1, 1)
    stored = scan.rows["stored"].astype(np.int64)
    return int(raw.sum()), int(np.where(stored > 0, stored, raw).sum())


def dead_temp_files(store_dir: str, min_age_s: float, fs: FileSystem) -> Iterator[tuple[str, str, int]]:
    """Folder, name and bytes of temporary files that no living writer can own.

    A writer holds an advisory lock on its file and writes to it with every record, so a file that is old and
    not locked has none. Where locks do not work, age alone decides.
    """
    for folder in (store_dir, os.path.join(store_dir, SHARDS_FOLDER), os.path.join(store_dir, INDEX_FOLDER)):
        try:
            dir_fd = persist(fs.open_directory, folder, follow=folder == store_dir)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise access_error(folder, error) from error
        try:
            with accessing(folder):
                names = sorted(filter(TEMP_NAME.fullmatch, persist(fs.list_names, dir_fd)))
            for name in names:
                with suppress(OSError):  # gone meanwhile, or not ours to look at
                    size = _bytes_if_dead(name, dir_fd, min_age_s, fs)
                    if size is not None:
                        yield folder, name, size
        finally:
            release(fs, dir_fd)


def _bytes_if_dead(name: str, dir_fd: int, min_age_s: float, fs: FileSystem) -> int | None:
    fd = persist(fs.open_file, name, dir_fd=dir_fd)
    try:
        status = persist(fs.fstat, fd)
        if not is_regular(status) or fs.clock_s() - status.st_mtime < min_age_s:
            return None
        with suppress(OSError):
            if not fs.try_lock(fd):
                return None
        return (
            status.st_size if status.st_nlink == 1 else 0
        )  # a second name of a committed shard frees nothing
    finally:
        release(fs, fd)


def _file_bytes(folder: str, name: str, fs: FileSystem) -> int | None:
    with suppress(OSError):
        dir_fd = persist(fs.open_directory, folder, follow=False)
        try:
            return persist(fs.stat, name, dir_fd=dir_fd).st_size
        finally:
            release(fs, dir_fd)
    return None

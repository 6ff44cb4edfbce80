"""What a cache directory holds, read from every header, the index left aside: for `info`, `prune` and `convert`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from vggt_cache.identity import FeatureSpec
from vggt_cache.place import absolute
from vggt_cache.store.atomic_file import TEMP_NAME
from vggt_cache.store.directory import survey
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem, accessing, is_regular, released_after
from vggt_cache.store.index import INDEX_FOLDER, IndexFile
from vggt_cache.store.object_store import system_of
from vggt_cache.store.record import Rows, begins_key, record_bytes, sort_rows
from vggt_cache.store.shards import SHARDS_FOLDER, ShardEntry, ShardFolder

TEMP_MIN_AGE_S = 24 * 3600.0
"""A temporary file that was written to within this time may have a living writer."""


# ---------------------------------------------------------------- one store


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """All shards of a store, and all records that can be known of them."""

    shards: list[ShardEntry]
    rows: Rows
    """Sorted by key, the served copy of each key first. `shard` counts in `shards`."""

    @cached_property
    def served(self) -> npt.NDArray[np.bool_]:
        """For each row, whether it is the copy that readers get."""
        return begins_key(self.rows)

    @cached_property
    def winners(self) -> npt.NDArray[np.int64]:
        """For each row, the number of the row that readers get for its key."""
        result: npt.NDArray[np.int64] = np.flatnonzero(self.served)[np.cumsum(self.served) - 1]
        return result

    def superseded_shards(self) -> list[int]:
        """Numbers of the shards with a usable header of which no record is served."""
        serving = set(np.unique(self.rows["shard"][self.served]).tolist())
        return [n for n, shard in enumerate(self.shards) if n not in serving and not shard.problem]


def take_inventory(folder: ShardFolder) -> Inventory:
    """Read all headers. Raises CacheAccessError."""
    shards, rows = folder.read_headers(folder.names())
    return Inventory(shards=shards, rows=sort_rows(rows))


# ---------------------------------------------------------------- for `info`


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
    """Of all records, as they lie in the files."""
    raw_bytes: int
    """Of the same features as they are given out."""
    disk_bytes: int
    """Of shards, temporary files and index."""
    superseded_records: int
    """Records whose key a later shard has too; they are not served."""
    temp_files: int
    """Left behind by writers that died."""
    damaged_shards: tuple[tuple[str, str], ...]
    """Shards whose header cannot be used: name, and why."""
    indexed: bool
    reclaimable_bytes: int
    """What `prune` with damaged=True would free: temporary files, superseded shards, what is lost of damaged ones."""


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
    path = absolute(cache_dir)
    fs = system_of(path, fs)
    specs, unreadable = survey(path, fs)
    return CacheDescription(
        cache_dir=path,
        stores=tuple(_describe_store(path, spec, fs) for spec in specs),
        unreadable=tuple((name, str(error)) for name, error in unreadable),
    )


def _describe_store(cache_dir: str, spec: FeatureSpec, fs: FileSystem) -> StoreDescription:
    path = os.path.join(cache_dir, spec.short_name)
    with closing(ShardFolder(path, spec, fs=fs)) as folder:
        found = take_inventory(folder)
    temps = list(dead_temp_files(path, TEMP_MIN_AGE_S, fs))
    index_bytes = IndexFile(path, spec.fingerprint, fs).file_bytes()
    temp_bytes = sum(size for _, _, size in temps)
    damaged = [shard for shard in found.shards if shard.problem]
    raw, stored = record_bytes(found.rows, spec)
    # Records of shards with a damaged header would move to a new one.
    has_problem = np.array([bool(shard.problem) for shard in found.shards], np.bool_)
    rescued = record_bytes(found.rows[has_problem[found.rows["shard"]]], spec)[1]
    return StoreDescription(
        spec=spec,
        path=path,
        entries=int(found.served.sum()),
        shards=len(found.shards),
        codecs=dict(sorted(Counter(shard.codec for shard in found.shards if not shard.problem).items())),
        stored_bytes=stored,
        raw_bytes=raw,
        disk_bytes=sum(shard.file_bytes for shard in found.shards) + temp_bytes + (index_bytes or 0),
        superseded_records=int((~found.served).sum()),
        temp_files=len(temps),
        damaged_shards=tuple((shard.name, shard.problem) for shard in damaged),
        indexed=index_bytes is not None,
        reclaimable_bytes=temp_bytes
        + sum(found.shards[number].file_bytes for number in found.superseded_shards())
        + sum(shard.file_bytes for shard in damaged if not shard.foreign)
        - rescued,
    )


def dead_temp_files(store_dir: str, min_age_s: float, fs: FileSystem) -> Iterator[tuple[str, str, int]]:
    """Folder, name and bytes of temporary files that no living writer can own.

    A writer holds an advisory lock on its file and writes to it with every record, so a file that is old and
    not locked has none. Where locks do not work, age alone decides.
    """
    for folder in (store_dir, os.path.join(store_dir, SHARDS_FOLDER), os.path.join(store_dir, INDEX_FOLDER)):
        with accessing(folder):
            try:
                dir_fd = fs.open_directory(folder, follow=folder == store_dir)
            except FileNotFoundError:
                continue
        with released_after(fs, dir_fd):
            with accessing(folder):
                names = sorted(filter(TEMP_NAME.fullmatch, fs.list_names(dir_fd)))
            for name in names:
                with suppress(OSError):  # gone meanwhile, or not ours to look at
                    size = _bytes_if_dead(name, dir_fd, min_age_s, fs)
                    if size is not None:
                        yield folder, name, size


def _bytes_if_dead(name: str, dir_fd: int, min_age_s: float, fs: FileSystem) -> int | None:
    with released_after(fs, fs.open_file(name, dir_fd=dir_fd)) as fd:
        status = fs.fstat(fd)
        if not is_regular(status) or fs.clock_s() - status.st_mtime < min_age_s:
            return None
        with suppress(OSError):
            if not fs.try_lock(fd):
                return None
        return (
            status.st_size if status.st_nlink == 1 else 0
        )  # a second name of a committed shard frees nothing

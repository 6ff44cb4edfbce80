"""Where things lie in a cache directory, which stores it holds, and how a new one is made.

<cache_dir>/<context>-<fingerprint[:16]>/     one store per FeatureSpec
    spec.json                                 the specification in canonical JSON
    shards/<12 hex ms>-<16 hex random>.safetensors
    index/rows                                derived from the shards
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from vggt_cache.errors import CacheNotFoundError, NotACacheError, SpecMismatchError, StoreError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.faults import access_error, accessing, commit_error
from vggt_cache.store.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    is_regular,
    persist,
    read_bytes,
    release,
    sync_directory,
)
from vggt_cache.store.parse import parse_header, parse_spec
from vggt_cache.store.publish import PendingFile
from vggt_cache.store.reader import SHARD_NAME, SHARDS_FOLDER, open_regular, read_header_bytes

SPEC_FILE = "spec.json"
MAX_SPEC_BYTES = 64 * 1024
STORE_NAME = re.compile(r"(?:frame|causal)-[0-9a-f]{16}")
_SHARDS_TRIED_FOR_SPEC = 8


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a cache directory holds."""

    specs: tuple[FeatureSpec, ...]
    """Ordered by the name of their folder, which is `short_name`."""
    unreadable: tuple[tuple[str, StoreError], ...]
    """Folders that are named like a store and have no readable specification: name, and why."""


def list_stores(cache_dir: str | os.PathLike[str], fs: FileSystem = OPERATING_SYSTEM) -> list[FeatureSpec]:
    """Specifications of the stores in a cache directory. Errors as for `survey`."""
    return list(survey(cache_dir, fs).specs)


def survey(cache_dir: str | os.PathLike[str], fs: FileSystem = OPERATING_SYSTEM) -> Survey:
    """Look what is in a cache directory. Modifies nothing.

    Raises CacheNotFoundError where there is no such directory, NotACacheError where it is something else,
    CacheAccessError where it cannot be read.
    """
    path = os.fspath(cache_dir)
    dir_fd = _open_cache_dir(path, fs)
    specs, unreadable = [], []
    try:
        with accessing(path):
            names = sorted(filter(STORE_NAME.fullmatch, persist(fs.list_names, dir_fd)))
        for name in names:
            try:
                specs.append(_read_spec(path, name, dir_fd, fs))
            except StoreError as error:
                unreadable.append((name, error))
    finally:
        release(fs, dir_fd)
    return Survey(specs=tuple(specs), unreadable=tuple(unreadable))


def _open_cache_dir(path: str, fs: FileSystem) -> int:
    try:
        return persist(fs.open_directory, path)
    except FileNotFoundError as error:
        raise CacheNotFoundError(
            f"there is no directory {path}, so there is no cache to read: check the path, or make the cache with "
            "`vggt-cache precompute`"
        ) from error
    except NotADirectoryError as error:
        raise NotACacheError(
            f"{path} is not a directory, so it cannot be a cache: give the directory that was --cache_dir"
        ) from error
    except OSError as error:
        raise access_error(path, error) from error


# ---------------------------------------------------------------- specification of a store


def _read_spec(cache_dir: str, name: str, cache_fd: int, fs: FileSystem) -> FeatureSpec:
    """From spec.json, or where that is lost or damaged from a shard, which carries it too."""
    with accessing(os.path.join(cache_dir, name)):
        store_fd = persist(fs.open_directory, name, dir_fd=cache_fd)
        try:
            try:
                return _named(name, parse_spec(_read_small_file(fs, SPEC_FILE, store_fd)))
            except (FileNotFoundError, UnicodeDecodeError, StoreError) as error:
                spec = _spec_of_a_shard(name, store_fd, fs)
                if spec is None:
                    raise _lost_spec(os.path.join(cache_dir, name), error) from error
                return spec
        finally:
            release(fs, store_fd)


def _lost_spec(path: str, error: Exception) -> SpecMismatchError:
    return SpecMismatchError(
        f"{path}/{SPEC_FILE} is missing or damaged ({error}) and no shard beside it tells the specification: remove "
        "this folder if it holds no shards, else precompute again into a new directory"
    )


def _named(name: str, spec: FeatureSpec) -> FeatureSpec:
    if spec.short_name != name:
        raise SpecMismatchError(
            f"the specification in {name} belongs to {spec.short_name}: a folder was renamed or a file misplaced"
        )
    return spec


def _spec_of_a_shard(name: str, store_fd: int, fs: FileSystem) -> FeatureSpec | None:
    try:
        shards_fd = persist(fs.open_directory, SHARDS_FOLDER, dir_fd=store_fd, follow=False)
    except OSError:
        return None
    try:
        for shard in sorted(filter(SHARD_NAME.fullmatch, persist(fs.list_names, shards_fd)))[
            :_SHARDS_TRIED_FOR_SPEC
        ]:
            with suppress(StoreError, OSError):
                return _named(name, _spec_in(shard, shards_fd, fs))
    finally:
        release(fs, shards_fd)
    return None


def _spec_in(shard: str, shards_fd: int, fs: FileSystem) -> FeatureSpec:
    fd, _ = open_regular(fs, shard, shards_fd)
    try:
        return parse_header(read_header_bytes(fs, fd, shard), shard).spec
    finally:
        release(fs, fd)


def _read_small_file(fs: FileSystem, name: str, dir_fd: int) -> str:
    fd = persist(fs.open_file, name, dir_fd=dir_fd)
    try:
        if not is_regular(persist(fs.fstat, fd)):
            raise SpecMismatchError(f"{name} is not a plain file")
        return read_bytes(fs, fd, MAX_SPEC_BYTES, 0).decode("utf-8")
    finally:
        release(fs, fd)


# ---------------------------------------------------------------- a new store


def create_store(
    cache_dir: str | os.PathLike[str], spec: FeatureSpec, fs: FileSystem = OPERATING_SYSTEM
) -> Path:
    """Make the folders and spec.json of a store, durably; returns its path, `cache_dir/spec.short_name`.

    Does nothing where the store exists already, and any number of processes may call it at once: all of them
    write the same bytes. Raises CommitError.
    """
    store_dir = Path(cache_dir) / spec.short_name
    try:
        _make_directories(str(store_dir / SHARDS_FOLDER), fs)
        store_fd = persist(fs.open_directory, str(store_dir))
        try:
            _write_spec(spec, store_fd, fs)
        finally:
            release(fs, store_fd)
        # Another process may have made the folders and died before they were synced.
        for directory in (store_dir, store_dir.parent):
            _sync_path(str(directory), fs)
    except OSError as error:
        raise commit_error(str(store_dir), error) from error
    return store_dir


def _make_directories(path: str, fs: FileSystem) -> None:
    try:
        persist(fs.make_directory, path)
    except FileExistsError:
        return  # should it be no directory, opening it will say so
    except FileNotFoundError:
        parent = os.path.dirname(os.path.abspath(path))
        _make_directories(parent, fs)
        _make_directories(path, fs)
        return
    _sync_path(os.path.dirname(os.path.abspath(path)), fs)


def _sync_path(path: str, fs: FileSystem) -> None:
    try:
        dir_fd = persist(fs.open_directory, path)
    except PermissionError:
        return  # a parent that we may pass through and not read, such as /
    try:
        sync_directory(fs, dir_fd)
    finally:
        release(fs, dir_fd)


def _write_spec(spec: FeatureSpec, store_fd: int, fs: FileSystem) -> None:
    with suppress(OSError, UnicodeDecodeError, StoreError):
        if _read_small_file(fs, SPEC_FILE, store_fd) == spec.to_json():
            return
    pending = PendingFile(fs, store_fd)
    try:
        pending.write(spec.to_json().encode(), 0)
        pending.seal(read_only=False)
        pending.publish_over(SPEC_FILE)
    except BaseException:
        pending.discard()
        raise

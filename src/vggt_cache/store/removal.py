"""What `prune` and `convert` do before a shard goes, and when it has gone."""

from __future__ import annotations

import os

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.faults import access_error, commit_error
from vggt_cache.store.filesystem import FileSystem, persist, release, sync_directory
from vggt_cache.store.reader import ShardReader
from vggt_cache.store.scan import Scan, scan_store
from vggt_cache.store.view import StoreView


def scan_durably(reader: ShardReader, store_dir: str) -> Scan:
    """What is there, and on the disk: nothing may go for the sake of a shard that a power loss could take.

    Raises CommitError, CacheAccessError.
    """
    scan = scan_store(reader)
    try:
        reader.sync_names()
    except OSError as error:
        raise commit_error(store_dir, error) from error
    return scan


def remove_file(folder: str, name: str, fs: FileSystem) -> None:
    """Remove a file, durably; it may be gone already. Raises CacheAccessError."""
    try:
        dir_fd = persist(fs.open_directory, folder)
        try:
            persist(fs.unlink, name, dir_fd=dir_fd)
            sync_directory(fs, dir_fd)
        finally:
            release(fs, dir_fd)
    except FileNotFoundError:
        pass  # another process was quicker
    except OSError as error:
        raise access_error(os.path.join(folder, name), error) from error


def renew_index(cache_dir: str, spec: FeatureSpec, fs: FileSystem) -> None:
    """Save an index of what is there now. Raises CacheAccessError."""
    view = StoreView(cache_dir, spec, fs=fs)
    try:
        view.save_index()
    finally:
        view.close()

"""Handles that a file server no longer knows (ESTALE): another client removed the file, or the server was restored."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from store_kit import equal, make_feature, make_key, no_descriptor_leaks, shard_path, write_shard
from vggt_cache.errors import CacheAccessError
from vggt_cache.store import FeatureCache, FileSystem, prune


class Forgetful(FileSystem):
    """Of a mount whose server forgets on demand what is open now."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._stale: set[int] = set()

    def forget(self) -> None:
        self._stale |= self._open

    def open_file(self, name: str, *, dir_fd: int) -> int:
        fd = super().open_file(name, dir_fd=dir_fd)
        self._open.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self._open.discard(fd)
        self._stale.discard(fd)
        super().close(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if fd in self._stale:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return super().preadv(fd, buffers, offset)


def test_a_shard_whose_handle_is_stale_is_opened_anew(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    server = Forgetful()
    with no_descriptor_leaks(), FeatureCache.open(tmp_path, context="frame", fs=server) as cache:
        for number in range(3):
            assert equal(cache.get_by_key(make_key(number)), make_feature(number))
            server.forget()


def test_of_a_shard_that_was_removed_at_the_server_an_older_copy_is_as_good(tmp_path: Path) -> None:
    write_shard(tmp_path, range(3))
    new = write_shard(tmp_path, range(2, 5))
    server = Forgetful()
    with FeatureCache.open(tmp_path, context="frame", fs=server) as cache:
        assert equal(cache.get_by_key(make_key(2)), make_feature(2))
        shard_path(tmp_path, new).unlink()
        server.forget()
        assert equal(cache.get_by_key(make_key(2)), make_feature(2))
        with pytest.raises(CacheAccessError, match=r"call refresh\(\)"):
            cache.get_by_key(make_key(4))


def test_a_shard_that_is_removed_while_its_header_is_read_does_not_keep_a_cache_from_opening(
    tmp_path: Path,
) -> None:
    class Pruned(Forgetful):
        """Another client prunes between opening and reading."""

        def open_file(self, name: str, *, dir_fd: int) -> int:
            fd = super().open_file(name, dir_fd=dir_fd)
            if name == old:
                os.unlink(name, dir_fd=dir_fd)
                self._stale.add(fd)
            return fd

    old = write_shard(tmp_path, range(3))
    new = write_shard(tmp_path, range(3))
    with FeatureCache.open(tmp_path, context="frame", fs=Pruned()) as cache:
        assert cache.shard_names() == (new,)
        assert equal(cache.get_by_key(make_key(0)), make_feature(0))


@pytest.mark.parametrize("use_index", [True, False])
def test_a_reader_that_is_overtaken_by_prune_again_and_again_finds_all_in_the_end(
    tmp_path: Path, use_index: bool
) -> None:
    class Overtaken(FileSystem):
        """Whatever shard it wants to look at was replaced a moment before."""

        rounds = 20

        def open_file(self, name: str, *, dir_fd: int) -> int:
            self._replace(name)
            return super().open_file(name, dir_fd=dir_fd)

        def stat(self, name: str, *, dir_fd: int) -> os.stat_result:
            self._replace(name)
            return super().stat(name, dir_fd=dir_fd)

        def _replace(self, name: str) -> None:
            if self.rounds and name.endswith(".safetensors"):
                self.rounds -= 1
                write_shard(tmp_path, range(3))
                prune(tmp_path, dry_run=False)

    write_shard(tmp_path, range(3))
    fs = Overtaken()
    with FeatureCache.open(tmp_path, context="frame", fs=fs, use_index=use_index) as cache:
        fs.rounds = 0
        assert all(equal(cache.get_by_key(make_key(number)), make_feature(number)) for number in range(3))

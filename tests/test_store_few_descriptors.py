"""A cache among others in a process whose descriptors run out: it closes shards that nobody is reading, and goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from store_kit import holds, save_index, write_shard
from vggt_cache.store import FeatureCache, FileSystem

SHARDS = 20


class FewDescriptors(FileSystem):
    """Has no more than `limit` of them."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.open: set[int] = set()

    def _take(self, fd: int) -> int:
        if len(self.open) >= self.limit:
            os.close(fd)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self.open.add(fd)
        return fd

    def open_directory(self, path: str, *, dir_fd: int | None = None, follow: bool = True) -> int:
        return self._take(super().open_directory(path, dir_fd=dir_fd, follow=follow))

    def open_file(self, name: str, *, dir_fd: int) -> int:
        return self._take(super().open_file(name, dir_fd=dir_fd))

    def list_names(self, dir_fd: int) -> list[str]:
        own = self.open_directory(".", dir_fd=dir_fd)
        try:
            return super().list_names(dir_fd)
        finally:
            self.close(own)

    def close(self, fd: int) -> None:
        self.open.discard(fd)
        super().close(fd)


@pytest.fixture(params=["index", "no index"])
def cache_dir(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for number in range(SHARDS):
        write_shard(tmp_path, [number], max_records=1)
    if request.param == "index":
        save_index(tmp_path)
    return tmp_path


@pytest.mark.promise("fork, spawn and few descriptors")
@pytest.mark.parametrize("limit", range(5, 30))
def test_reading_and_refreshing_go_on_however_few_descriptors_there_are(cache_dir: Path, limit: int) -> None:
    fs = FewDescriptors(limit)
    with FeatureCache.open(cache_dir, fs=fs) as cache:
        assert holds(cache, range(SHARDS))
        write_shard(cache_dir, [SHARDS], max_records=1)
        cache.refresh()
        assert holds(cache, range(SHARDS + 1))
    assert fs.open == set()


def test_a_thread_that_comes_too_late_to_close_anything_tries_again(cache_dir: Path) -> None:
    """Between the refusal and the look for idle shards, another thread has closed all of them."""

    class Crowded(FewDescriptors):
        late = True

        def open_file(self, name: str, *, dir_fd: int) -> int:
            try:
                return super().open_file(name, dir_fd=dir_fd)
            except OSError:
                if self.late:
                    self.late = False
                    pool = cache.open_shards
                    assert pool.release_idle(pool.releases)
                raise

    with FeatureCache.open(cache_dir, fs=Crowded(8)) as cache:
        assert holds(cache, range(SHARDS))

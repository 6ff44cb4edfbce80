"""Reading features back."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from vggt_cache.errors import CacheAccessError, CorruptRecordError, SettingsError, ShardFormatError
from vggt_cache.identity import KEY_BYTES, FeatureSpec, feature_key, frame_digest
from vggt_cache.store.derive import Deriver
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem
from vggt_cache.store.forks import renew_after_fork
from vggt_cache.store.format import Record
from vggt_cache.store.index import IndexDamagedError
from vggt_cache.store.reader import ShardReader, ShardVanishedError
from vggt_cache.store.selection import select_store
from vggt_cache.store.snapshot import Snapshot
from vggt_cache.store.tensors import bytes_of, check_target, empty_feature

T = TypeVar("T")
Frame = str | os.PathLike[str] | bytes


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache object has done since it was opened, in this process."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    """Seconds spent finding, reading and checking features, added up over threads."""


class FeatureCache:
    """The features of one specification, as a snapshot: what was committed when it was opened or refreshed.

    Safe to use from several threads, after fork, and in processes started with spawn, where it is the same
    snapshot. Nothing here writes, except `save_index`.
    """

    def __init__(
        self,
        cache_dir: str,
        spec: FeatureSpec,
        *,
        root: str | None,
        names: Sequence[str] | None,
        use_index: bool,
        fs: FileSystem,
    ) -> None:
        """Use `open`. `names`: exactly these shards."""
        self.spec = spec
        self.cache_dir = cache_dir
        self._root = root
        self._fs = fs
        self._use_index = use_index
        self._closed = False
        self._stats = CacheStats()
        self._lock = threading.RLock()
        renew_after_fork(self)
        store_dir = os.path.join(cache_dir, spec.short_name)
        self._reader = ShardReader(store_dir, spec, fs=fs)
        self._deriver = Deriver(store_dir, spec, self._reader, fs)
        self._snapshot = (
            self._deriver.current(use_index=use_index) if names is None else self._deriver.exactly(names)
        )

    @classmethod
    def open(
        cls,
        cache_dir: str | os.PathLike[str],
        *,
        spec: FeatureSpec | None = None,
        fingerprint: str | None = None,
        context: str | None = None,
        root: str | os.PathLike[str] | None = None,
        use_index: bool = True,
        fs: FileSystem = OPERATING_SYSTEM,
    ) -> FeatureCache:
        """Open a cache directory for reading. Creates and changes nothing.

        `spec`, `fingerprint` (its first digits are enough) and `context` say which cache is meant, where
        several share the directory. `root`: where relative frame paths start (default: the current directory).
        `use_index=False` reads the header of every shard instead of the index, as `verify` does.

        Raises CacheNotFoundError, NotACacheError, AmbiguousCacheError, SpecMismatchError, CacheAccessError, or
        SettingsError. Shards whose header is damaged are left out, with one warning; see `damaged_shards`.
        """
        path = os.path.abspath(cache_dir)
        chosen = select_store(path, spec=spec, fingerprint=fingerprint, context=context, fs=fs)
        root = None if root is None else os.path.abspath(root)
        cache = cls(path, chosen, root=root, names=None, use_index=use_index, fs=fs)
        cache._warn_of_damage(())
        return cache

    # ------------------------------------------------------------ features

    def get(self, frames: Sequence[Frame], *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The feature [h, w, C] of an ordered list of frames; None when it is not in the cache.

        `frames`: paths of image files, or the files' bytes. Context `frame`: the feature of the last frame, of
        which alone the file is read; `causal`: of the last frame having seen the others. The files are read
        each time, so a frame that was replaced is never given its old feature. `out`: a contiguous CPU tensor
        of the feature's shape and dtype, which is filled and returned; without it the result is the caller's own.

        Raises FrameError for an unreadable image file, CorruptRecordError, CacheAccessError, SettingsError.
        """
        return self.get_by_key(self.key_of(frames), out=out)

    def key_of(self, frames: Sequence[Frame]) -> bytes:
        """The 16-byte key under which the feature of these frames is stored. Raises FrameError, SettingsError."""
        if isinstance(frames, (str, bytes, os.PathLike)) or not frames:
            raise SettingsError(
                f"frames is {str(frames)[:60]!r}, and a list of frames is needed, such as ['000.png', '003.png']"
            )
        used = frames[-1:] if self.spec.context == "frame" else frames
        return feature_key(self.spec, [frame_digest(self._bytes_of_frame(frame)) for frame in used])

    def get_by_key(self, key: bytes, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The feature [h, w, C] under a key; None when it is not in the cache. `out` and errors as for `get`."""
        started_s = time.perf_counter()
        feature = self._read(_checked(key), out)
        self._count(feature, time.perf_counter() - started_s)
        return feature

    def verify_record(self, key: bytes) -> bool:
        """Whether the key is in the cache; its record is read and checked. Raises CorruptRecordError, CacheAccessError."""
        return self._read(_checked(key), None) is not None

    # ------------------------------------------------------------ keys

    def __len__(self) -> int:
        return self._ask(lambda snapshot: snapshot.key_count)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and len(key) == KEY_BYTES and bool(self._ask(lambda s: s.find(key)))

    def keys(self) -> Iterator[bytes]:
        """Every key once, in order, from the snapshot at the time of the call. Takes little memory."""
        last, snapshot = b"", self._snapshot
        while True:
            try:
                for last in snapshot.keys(last):
                    yield last
                return
            except IndexDamagedError:
                snapshot = self._deriver.without_index(snapshot)

    def __iter__(self) -> Iterator[bytes]:
        return self.keys()

    def shard_of(self, key: bytes) -> str | None:
        """Name of the shard from which this key is read; None when it is not in the cache."""
        found = self._ask(lambda snapshot: snapshot.find(_checked(key)))
        return found[0][0] if found else None

    def shard_names(self) -> tuple[str, ...]:
        """Names of the shards of the snapshot, oldest first."""
        return self._snapshot.names

    # ------------------------------------------------------------ the snapshot

    @property
    def snapshot(self) -> str:
        """32 hex digits, equal for equal sets of shards: ranks compare it to know that they see the same cache."""
        return self._snapshot.digest(self.spec)

    @property
    def damaged_shards(self) -> tuple[tuple[str, str], ...]:
        """Shards that were left out because their header cannot be read: name, and why."""
        return self._snapshot.damaged

    @property
    def stats(self) -> CacheStats:
        return self._stats

    def refresh(self) -> None:
        """Take in shards that were committed since. Features are lost only if their shards were removed."""
        self._require_open()
        with self._lock:
            before = self._snapshot
            after = self._deriver.current(before, use_index=self._use_index)
            if after.names != before.names:
                self._snapshot = after
        self._warn_of_damage(before.damaged)

    def save_index(self) -> bool:
        """Save an index of this snapshot, so that opening reads no headers. For writers, after their last commit.

        False, with a warning, where the directory cannot be written; nothing depends on it.
        """
        self._require_open()
        with self._lock:
            return self._ask(self._deriver.save)

    def close(self) -> None:
        """Close all files. Any later use raises CacheAccessError."""
        self._closed = True
        self._reader.close()
        for level in self._snapshot.levels:
            level.index.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_snapshot", None) is not None:
            self.close()
        elif getattr(self, "_reader", None) is not None:
            self._reader.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process needs to open the same snapshot."""
        names = "\n".join(self._snapshot.names)
        return _reopen, (self.cache_dir, self.spec, self._root, names, self._fs)

    def __repr__(self) -> str:
        return f"FeatureCache({self.cache_dir!r}, {self.spec.short_name}, {len(self._snapshot.names)} shards)"

    def start_anew_in_child(self) -> None:
        self._lock = threading.RLock()

    # ------------------------------------------------------------ steps

    def _read(self, key: bytes, out: torch.Tensor | None) -> torch.Tensor | None:
        vanished = None
        for shard, record in self._ask(lambda snapshot: snapshot.find(key)):
            try:
                return self._read_record(shard, record, out)
            except ShardVanishedError as error:
                vanished = error  # an older copy of the same feature may still be there
            except CorruptRecordError:
                if not self._index_is_wrong(shard, record):
                    raise
                self._distrust_index(self._snapshot)
                return self._read(key, out)
        if vanished is not None:
            raise vanished
        return None

    def _read_record(self, shard: str, record: Record, out: torch.Tensor | None) -> torch.Tensor:
        if out is not None:
            check_target(out, self.spec, record.h, record.w)
        feature = out

        def memory() -> memoryview:
            nonlocal feature
            if feature is None:
                feature = empty_feature(self.spec, record.h, record.w)
            return bytes_of(feature)

        self._reader.read(shard, record, memory)
        assert feature is not None
        return feature

    def _index_is_wrong(self, shard: str, record: Record) -> bool:
        """Whether the shard itself tells something else about a record than the index did."""
        if not self._use_index:
            return False
        try:
            return record not in self._reader.header(shard).records
        except (ShardFormatError, CacheAccessError):
            return False

    def _ask(self, question: Callable[[Snapshot], T]) -> T:
        """The snapshot's answer; where the index proves damaged, it is put together from the shards first."""
        self._require_open()
        snapshot = self._snapshot
        try:
            return question(snapshot)
        except IndexDamagedError:
            return question(self._distrust_index(snapshot))

    def _distrust_index(self, snapshot: Snapshot) -> Snapshot:
        with self._lock:
            if self._snapshot is snapshot:
                self._use_index = False
                self._snapshot = self._deriver.without_index(snapshot)
            return self._snapshot

    def _bytes_of_frame(self, frame: Frame) -> bytes:
        if isinstance(frame, bytes):
            return frame
        from vggt_cache.frames import read_frame

        return read_frame(os.path.join(self._root or "", frame))

    def _count(self, feature: torch.Tensor | None, seconds: float) -> None:
        with self._lock:
            before = self._stats
            self._stats = CacheStats(
                hits=before.hits + (feature is not None),
                misses=before.misses + (feature is None),
                bytes_read=before.bytes_read + (0 if feature is None else feature.nbytes),
                read_s=before.read_s + seconds,
            )

    def _require_open(self) -> None:
        if self._closed:
            raise CacheAccessError(f"the cache {self.cache_dir} was closed: open it again to read from it")

    def _warn_of_damage(self, known: tuple[tuple[str, str], ...]) -> None:
        new = [item for item in self.damaged_shards if item not in known]
        if new:
            warnings.warn(
                f"{self.cache_dir}: {len(new)} damaged shard(s) are left out, the first being: {new[0][1]}; run "
                f"`vggt-cache prune {self.cache_dir} --damaged --yes`, then precompute again",
                stacklevel=3,
            )


def _checked(key: bytes) -> bytes:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise SettingsError(
            f"{str(key)[:60]!r} is no key: a key is {KEY_BYTES} bytes, as `key_of` gives them"
        )
    return key


def _reopen(cache_dir: str, spec: FeatureSpec, root: str | None, names: str, fs: FileSystem) -> FeatureCache:
    """The other end of sending a cache to another process."""
    shards = names.split("\n") if names else []
    return FeatureCache(cache_dir, spec, root=root, names=shards, use_index=True, fs=fs)

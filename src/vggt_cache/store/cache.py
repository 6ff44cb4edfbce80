"""Reading features back: the interface for training."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from vggt_cache.errors import SettingsError
from vggt_cache.identity import KEY_BYTES, FeatureSpec, feature_key, frame_digest
from vggt_cache.store.encoded import read_encoded
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem
from vggt_cache.store.forks import renew_after_fork
from vggt_cache.store.rows import Record
from vggt_cache.store.selection import select_store
from vggt_cache.store.tensors import bytes_of, check_target, empty_feature
from vggt_cache.store.view import StoreView

if TYPE_CHECKING:
    from vggt_cache.codec.quantise import EncodedFeature

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

    Safe to use from several threads, after fork, and in processes started with spawn, which get the same
    snapshot. Nothing here writes, except `save_index`.
    """

    def __init__(
        self, cache_dir: str, spec: FeatureSpec, view: StoreView, *, root: str | None, fs: FileSystem
    ) -> None:
        """Use `open`."""
        self.spec = spec
        self.cache_dir = cache_dir
        self._view = view
        self._root = root
        self._fs = fs
        self._counts = asdict(CacheStats())
        self._stats_lock = threading.Lock()
        renew_after_fork(self)

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
        view = StoreView(path, chosen, fs=fs, use_index=use_index)
        cache = cls(path, chosen, view, root=None if root is None else os.path.abspath(root), fs=fs)
        cache._warn_of_damage(())
        return cache

    # ------------------------------------------------------------ features

    def get(self, frames: Sequence[Frame], *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The feature [h, w, C] of an ordered list of frames; None when it is not in the cache.

        `frames`: paths of image files, or the files' bytes. Context `frame`: the feature of the last frame, of
        which alone the file is read; `causal`: of the last frame having seen the others. The files are read
        each time, so a frame that was replaced is never given its old feature. `out`: a contiguous CPU tensor
        of the feature's shape and dtype, which is filled and returned, best torch's own memory (into numpy's, which
        starts 16 bytes behind a page, some processors copy slowly); without it the result is the caller's own.

        Raises FrameError for an unreadable image file, CorruptRecordError, CacheAccessError, SettingsError.
        """
        return self.get_by_key(self.key_of(frames), out=out)

    def key_of(self, frames: Sequence[Frame]) -> bytes:
        """The 16-byte key under which the feature of these frames is stored. Raises FrameError, SettingsError."""
        if isinstance(frames, (str, bytes, os.PathLike)) or not frames:
            raise SettingsError(
                f"frames is {str(frames)[:60]!r}, and a list of frames is needed, such as ['000.png', '003.png']"
            )
        used = self.spec.context_rule.used(frames)
        return feature_key(self.spec, [frame_digest(self._bytes_of_frame(frame)) for frame in used])

    def get_by_key(self, key: bytes, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The feature [h, w, C] under a key; None when it is not in the cache. `out` and errors as for `get`."""
        started_s = time.perf_counter()
        feature = self._read(_checked(key), out)
        self._count(feature, time.perf_counter() - started_s)
        return feature

    def get_encoded(self, key: bytes, *, out: torch.Tensor | None = None) -> EncodedFeature | None:
        """An int8 feature as it lies in the store, to be decoded on another device; None when it is absent.

        `out`: a contiguous uint8 CPU tensor [bytes], such as pinned memory, whose first bytes are filled; without
        it the memory is the caller's own. Raises SettingsError where it is too small, or where this cache does not
        keep its features in int8; other errors as for `get_by_key`.
        """
        started_s = time.perf_counter()
        found = read_encoded(self._view, self.spec, _checked(key), out)
        self._count(None if found is None else found.record, time.perf_counter() - started_s)
        return found

    def verify_record(self, key: bytes) -> bool:
        """Whether the cache has the key; its record is read and checked. Errors as for `get_by_key`."""
        return self._read(_checked(key), None) is not None

    # ------------------------------------------------------------ keys

    def __len__(self) -> int:
        return self._view.key_count()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and len(key) == KEY_BYTES and bool(self._view.find(key))

    def keys(self) -> Iterator[bytes]:
        """Every key once, in order, from the snapshot at the time of the call. Takes little memory."""
        return self._view.keys()

    def __iter__(self) -> Iterator[bytes]:
        return self._view.keys()

    def shard_of(self, key: bytes) -> str | None:
        """Name of the shard from which this key is read; None when the cache has not the key."""
        found = self._view.find(_checked(key))
        return found[0][0] if found else None

    def shard_names(self) -> tuple[str, ...]:
        """Names of the shards of the snapshot, oldest first."""
        return self._view.snapshot.names

    # ------------------------------------------------------------ the snapshot

    @property
    def snapshot(self) -> str:
        """32 hex digits, equal for equal sets of shards: ranks compare it to know that they see the same cache."""
        return self._view.snapshot.digest(self.spec)

    @property
    def damaged_shards(self) -> tuple[tuple[str, str], ...]:
        """Shards that were left out because their header cannot be read: name, and why."""
        return self._view.snapshot.damaged

    @property
    def stats(self) -> CacheStats:
        with self._stats_lock:
            return CacheStats(**self._counts)

    def with_shards(self, names: Sequence[str]) -> FeatureCache:
        """The same cache with exactly these shards as its snapshot, as another process sees it.

        Raises CacheAccessError where one of them is not there.
        """
        return _reopen(self.cache_dir, self.spec, "\n".join(names), self._root, self._fs)

    def refresh(self) -> None:
        """Take in shards that were committed since. Features are lost only if their shards were removed."""
        known = self.damaged_shards
        self._view.refresh()
        self._warn_of_damage(known)

    def save_index(self) -> bool:
        """Save an index of this snapshot, so that opening reads no headers. For writers, after their last commit.

        False, with a warning, where the directory cannot be written; nothing depends on it.
        """
        return self._view.save_index()

    def close(self) -> None:
        """Close all files. Any later use raises CacheAccessError."""
        self._view.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if "_view" in self.__dict__:
            self._view.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process needs to open the same snapshot."""
        return _reopen, (self.cache_dir, self.spec, "\n".join(self.shard_names()), self._root, self._fs)

    def __repr__(self) -> str:
        return f"FeatureCache({self.cache_dir!r}, {self.spec.short_name}, {len(self.shard_names())} shards)"

    def start_anew_in_child(self) -> None:
        """Called in a forked process, where another thread may have held the lock."""
        self._stats_lock = threading.Lock()

    # ------------------------------------------------------------ steps

    def _read(self, key: bytes, out: torch.Tensor | None) -> torch.Tensor | None:
        feature = out

        def memory_for(record: Record) -> memoryview:
            nonlocal feature
            if out is None:
                feature = empty_feature(self.spec, record.h, record.w)
            else:
                check_target(out, self.spec, record.h, record.w)
            assert feature is not None
            return bytes_of(feature)

        return feature if self._view.read(key, memory_for) else None

    def _bytes_of_frame(self, frame: Frame) -> bytes:
        if isinstance(frame, bytes):
            return frame
        from vggt_cache.frames import read_frame

        return read_frame(os.path.join(self._root or "", frame))

    def _count(self, feature: torch.Tensor | None, seconds: float) -> None:
        with self._stats_lock:
            counts = self._counts
            counts["read_s"] += seconds
            if feature is None:
                counts["misses"] += 1
            else:
                counts["hits"] += 1
                counts["bytes_read"] += feature.nbytes

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


def _reopen(cache_dir: str, spec: FeatureSpec, names: str, root: str | None, fs: FileSystem) -> FeatureCache:
    """The other end of sending a cache to another process."""
    view = StoreView(cache_dir, spec, fs=fs, names=names.split("\n") if names else [])
    return FeatureCache(cache_dir, spec, view, root=root, fs=fs)

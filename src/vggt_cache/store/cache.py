"""Reading features back: the interface for training."""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from vggt_cache.codec import INT8
from vggt_cache.context import label_of_last
from vggt_cache.errors import (
    CacheAccessError,
    CorruptRecordError,
    MissingFeatureError,
    SettingsError,
    ShardFormatError,
)
from vggt_cache.identity import KEY_BYTES, FeatureSpec, feature_key, frame_digest, pixel_digest, pixel_key
from vggt_cache.place import absolute
from vggt_cache.store.direct import AUTO, DIRECT, bytes_of_table, io_of, is_larger_than_memory
from vggt_cache.store.directory import select_store
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem
from vggt_cache.store.object_store import system_of
from vggt_cache.store.read_through import ReadThrough
from vggt_cache.store.record import Record, RecordTable, shape_of
from vggt_cache.store.shards import OpenShard, OpenShards, ShardFolder, ShardVanishedError
from vggt_cache.store.siblings import Siblings
from vggt_cache.store.snapshot import NOTHING, Snapshot, SnapshotTaker
from vggt_cache.store.staged import Staging
from vggt_cache.store.tensors import bytes_for, bytes_of, check_target, empty_feature

if TYPE_CHECKING:
    from vggt_cache.codec.quantise import EncodedFeature

T = TypeVar("T")
_FILE = (str, os.PathLike, bytes, bytearray, memoryview)
Frame = Any
"""The path of an image file, or the bytes of one; a PIL image; or pixels as the encoder sees them, see `pixels_of`."""


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """What a cache object has done since it was opened, in this process."""

    hits: int = 0
    staged_hits: int = 0
    """Those of the hits that were read from this machine's stage, not from the cache."""
    misses: int = 0
    bytes_read: int = 0
    read_s: float = 0.0
    """Seconds spent finding, reading and checking features, added up over threads."""


class FeatureCache:
    """The features of one specification, as a snapshot: what was committed when it was opened or refreshed.

    Safe to use from several threads, after fork, and in processes started with spawn, which get the same
    snapshot. Nothing here writes, except `save_index`; with a stage, records are kept there.
    """

    def __init__(
        self,
        cache_dir: str,
        spec: FeatureSpec,
        *,
        root: str | None,
        fs: FileSystem,
        names: Sequence[str] | None = None,
        use_index: bool = True,
        io: str | None = None,
        stage: Staging | None = None,
    ) -> None:
        """Use `open`. `names`: exactly these shards, instead of those that are there now."""
        self.spec, self.cache_dir = spec, cache_dir
        self._root, self.io = root, io_of(io)
        self.staging, self.staged = stage, None if stage is None else ReadThrough(stage, spec)
        """Where records are kept on this machine, and what reads and keeps them there."""
        self._counts = asdict(CacheStats())
        self.siblings = Siblings(self, fs)
        self._make_locks()
        store_dir = os.path.join(cache_dir, spec.short_name)
        self._shards = ShardFolder(store_dir, spec, fs=fs)
        self._shards.on_read = None if self.staged is None else self.staged.keep
        self._taker = SnapshotTaker(store_dir, spec, self._shards, use_index=use_index)
        self._snapshot = NOTHING
        _ALIVE.add(self)
        try:
            self._snapshot = self._taker.take() if names is None else self._taker.exactly(names)
            self._shards.must_be_direct = self.io == DIRECT
            self._choose_io()
        except BaseException:
            self._shards.close()
            raise

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
        io: str | None = None,
        stage: Staging | None = None,
        fs: FileSystem = OPERATING_SYSTEM,
    ) -> FeatureCache:
        """Open a cache directory for reading. Creates and changes nothing.

        `spec`, `fingerprint` (its first digits are enough) and `context` say which cache is meant. Name the context: it
        decides what a feature is, another cache may join the directory, and without any of the three there is a
        warning. `root`: where relative frame paths start (default: the current directory).
        `use_index=False` reads the header of every shard instead of the index, as `verify` does. `io`: `buffered` reads
        through the page cache, `direct` past it (O_DIRECT) where the file system can; `auto` past it where the cache is
        larger than the memory that is free now, so that what is read would be forgotten before it is wanted again
        (default: the environment's VGGT_CACHE_IO, else `auto`). `stage`: a directory on a disk of this machine where
        features are looked for first, and kept when they had to be read from here.

        Raises CacheNotFoundError, NotACacheError, AmbiguousCacheError, SpecMismatchError, CacheAccessError, or
        SettingsError; CommitError where the stage cannot be made. Of shards whose header is damaged only what can be
        proved is used, with one warning; see `damaged_shards`.
        """
        path = absolute(cache_dir)
        fs = system_of(path, fs)
        if spec is None and fingerprint is None and context is None:
            warnings.warn(
                f"the cache {path} is opened without saying which context is meant, and features of one context are "
                "other numbers than those of another: give context=, as it was given to precompute",
                stacklevel=2,
            )
        chosen = select_store(path, spec=spec, fingerprint=fingerprint, context=context, fs=fs)
        where = None if root is None else os.path.abspath(root)
        if stage is not None:
            stage.prepare(path, chosen)
        cache = cls(path, chosen, root=where, fs=fs, use_index=use_index, io=io, stage=stage)
        cache._warn_of_damage(())
        return cache

    # ------------------------------------------------------------ features

    def get(
        self, frames: Iterable[Frame], *, out: torch.Tensor | None = None, strict: bool = False
    ) -> torch.Tensor | None:
        """The feature (FeatureSpec.shape) of an ordered list of frames.

        When it is not in the cache: None, or with `strict` an error.

        `frames`: paths of image files, or the files' bytes; PIL images, which are preprocessed as files are; or pixels
        as the encoder sees them, tensors or arrays [3, H, W] or [H, W, 3], uint8 or floats in [0, 1]. What was computed
        from files is found by their pixels, and the other way round, in all stores of the directory. In context
        `frame` the feature is of the last frame, and only that is read; in `causal`, of the last frame after it has
        seen the others; in `joint`, of all frames, which is its first axis. The files are read each time, so a frame
        that was replaced never gets its old feature. `out`: a contiguous CPU tensor of the feature's shape and dtype,
        which is filled and returned, best torch's own memory (some processors copy slowly into numpy's, which starts 16
        bytes behind a page); without it the result is the caller's own.

        Raises FrameError for an unreadable image file, CorruptRecordError, CacheAccessError, SettingsError, and with
        `strict` MissingFeatureError.
        """
        listed = _listed(frames)
        feature = self.get_by_key(self.key_of(listed), out=out)
        if strict and feature is None:
            raise MissingFeatureError(
                f"the feature of {_named(listed)} is not in {self.cache_dir} ({self.spec.short_name}): precompute it, "
                "or open the cache with another context if that is what was meant"
            )
        return feature

    def key_of(self, frames: Iterable[Frame]) -> bytes:
        """The 16-byte key of the feature of these frames. Raises FrameError, SettingsError."""
        used = self.spec.context_rule.used(_listed(frames))
        taken = [self._bytes_of_frame(frame) if isinstance(frame, _FILE) else frame for frame in used]
        if all(isinstance(frame, bytes) for frame in taken):
            return feature_key(self.spec, [frame_digest(frame) for frame in taken])
        from vggt_cache.pixels import pixels_of

        return pixel_key(
            self.spec, [pixel_digest(pixels_of(frame, self.spec.preprocessing)) for frame in taken]
        )

    def get_by_key(self, key: bytes, *, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The feature under a key; None when it is not in the cache. `out` and errors as for `get`."""
        started_s = time.perf_counter()
        feature = self._first_copy(key, lambda shard, record: self._feature_of(shard, record, out))
        self._count(feature, time.perf_counter() - started_s)
        return feature

    def get_encoded(self, key: bytes, *, out: torch.Tensor | None = None) -> EncodedFeature | None:
        """An int8 feature as it lies in the store, to be decoded on another device; None when it is absent.

        `out`: a contiguous uint8 CPU tensor [bytes], such as pinned memory, whose first bytes are filled; without
        it the memory is the caller's own. Raises SettingsError where it is too small, or where this cache does not
        keep its features in int8; other errors as for `get_by_key`.
        """
        started_s = time.perf_counter()
        if self.spec.feature_dtype != INT8:
            raise SettingsError(
                f"this cache keeps its features in {self.spec.feature_dtype}, not in {INT8}: use get_by_key"
            )
        found = self._first_copy(key, lambda shard, record: self._encoded_of(shard, record, out))
        self._count(None if found is None else found.record, time.perf_counter() - started_s)
        return found

    def verify_record(self, key: bytes) -> bool:
        """Whether the cache has the key; its record is read and checked. Errors as for `get_by_key`."""
        return self._first_copy(key, lambda shard, record: self._feature_of(shard, record, None)) is not None

    def stored(self, key: bytes) -> tuple[Record, memoryview] | None:
        """The record of a key, and its bytes as they lie in the shard, checked, in memory of their own.

        None when the key is not in the cache. Errors as for `get_by_key`.
        """

        def read(shard: OpenShard, record: Record) -> tuple[Record, memoryview]:
            memory = bytes_of(bytes_for(shard.stored_bytes(record), None))
            return record, shard.read_stored(record, memory)

        return self._first_copy(key, read)

    # ------------------------------------------------------------ keys

    def __len__(self) -> int:
        return self._now().table.key_count

    def __contains__(self, key: object) -> bool:
        return isinstance(key, bytes) and len(key) == KEY_BYTES and self.record_of(key) is not None

    def has_own(self, key: bytes) -> bool:
        """Whether the feature is in this very store, under this key."""
        return bool(self._now().table.find(_checked(key)))

    def which_are_own(
        self, keys: npt.NDArray[np.uint64], *, not_in: Collection[str] = ()
    ) -> npt.NDArray[np.bool_]:
        """For many keys (`record.key_array`) at once what `has_own` says [n]; shards `not_in` do not count."""
        table = self._now().table
        counts = np.array([name not in not_in for name in table.shards] + [False], np.bool_)
        which: npt.NDArray[np.bool_] = counts[table.find_shards(keys)]
        return which

    def keys(self) -> Iterator[bytes]:
        """Every key once, in order, from the snapshot at the time of the call. Takes little memory."""
        return self._now().table.keys()

    def __iter__(self) -> Iterator[bytes]:
        return self.keys()

    def copies_of(self, key: bytes) -> list[tuple[str, Record]]:
        """Shard and record of every copy of a key in this very store, the one that is served first."""
        return self._now().table.find(_checked(key))

    def record_of(self, key: bytes) -> Record | None:
        """The record that is served under a key, such as for its grid (`h`, `w`); None when it is not in the cache."""
        found = self.copies_of(key)
        if not found and (elsewhere := self.siblings.find(key, self)) is not None:
            found = elsewhere[0].copies_of(elsewhere[1])
        return found[0][1] if found else None

    def shard_of(self, key: bytes) -> str | None:
        """Name of the shard of this very store from which this key is read; None when it is not in there."""
        found = self.copies_of(key)
        return found[0][0] if found else None

    @property
    def table(self) -> RecordTable:
        """All records of the snapshot."""
        return self._now().table

    def shard_names(self) -> tuple[str, ...]:
        """Names of the shards of the snapshot, oldest first."""
        return self._snapshot.names

    # ------------------------------------------------------------ the snapshot

    @property
    def snapshot(self) -> str:
        """32 hex digits, equal for equal sets of shards: ranks compare it to know that they see the same cache."""
        return xxhash.xxh3_128_hexdigest("\n".join((self.spec.fingerprint, *self.shard_names())).encode())

    @property
    def damaged_shards(self) -> tuple[tuple[str, str], ...]:
        """Shards whose header cannot be used: name, and why. What is intact of them is served all the same."""
        return self._snapshot.damaged

    @property
    def unindexed_shards(self) -> tuple[str, ...]:
        """Shards whose header was read when the snapshot was taken, because no saved index covered them."""
        return self._snapshot.unindexed

    @property
    def open_shards(self) -> OpenShards:
        """The shards that are kept open."""
        return self._shards.pool

    @property
    def stats(self) -> CacheStats:
        """`staged_hits` counts those in other stores of the directory too, as `hits` does."""
        with self._stats_lock:
            own = CacheStats(**self._counts)
        return replace(own, staged_hits=own.staged_hits + self.siblings.staged_hits())

    def with_shards(self, names: Sequence[str]) -> FeatureCache:
        """The same cache with exactly these shards as its snapshot, as another process sees it.

        Raises CacheAccessError where one of them is not there.
        """
        return self._reopening(names)()

    def refresh(self) -> None:
        """Take in shards that were committed since. Features are lost only if their shards were removed."""
        self._shards.require_open()
        with self._lock:
            known = self.damaged_shards
            self._shards.reopen()
            after = self._taker.take(self._snapshot)
            if after.names != self._snapshot.names:
                self._snapshot = after
                self._choose_io()
        self.siblings.refresh()
        self._warn_of_damage(known)

    def save_index(self) -> bool:
        """Save an index of this snapshot, so that opening reads no headers. For writers, after their last commit.

        False, with a warning, where the directory cannot be written; nothing depends on it.
        """
        with self._lock:
            return self._taker.save(self._now())

    def close(self) -> None:
        """Close all files; reads that are under way still end well. Any later use raises CacheAccessError.

        What was read and is to be staged is committed first.
        """
        self._shards.close()
        self.siblings.close()
        if self.staged is not None:
            self.staged.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if "_shards" in self.__dict__:
            self._shards.close()
            if self.staged is not None:
                self.staged.close(wait=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """What another process needs to open the same snapshot."""
        return self._reopening(self.shard_names()), ()

    def _reopening(self, names: Sequence[str]) -> partial[FeatureCache]:
        fs, io, stage = self._shards.fs, self.io, self.staging
        return partial(
            FeatureCache, self.cache_dir, self.spec, root=self._root, fs=fs, names=names, io=io, stage=stage
        )

    def __repr__(self) -> str:
        return f"FeatureCache({self.cache_dir!r}, {self.spec.short_name}, {len(self.shard_names())} shards)"

    # ------------------------------------------------------------ threads and forks

    def _make_locks(self) -> None:
        self._lock = threading.Lock()
        """Held while the snapshot is replaced, or its index saved."""
        self._stats_lock = threading.Lock()
        self.siblings.lock = threading.Lock()

    @property
    def locks(self) -> tuple[threading.Lock, ...]:
        """All locks that a thread may hold while another one forks."""
        stage = () if self.staged is None else (self.staged.lock,)
        return self._lock, self._stats_lock, self.siblings.lock, self._shards.pool.lock, *stage

    # ------------------------------------------------------------ steps

    def _now(self) -> Snapshot:
        self._shards.require_open()
        return self._snapshot

    def _choose_io(self) -> None:
        table = self._snapshot.table
        self._shards.direct = self._shards.must_be_direct or (
            self.io == AUTO and is_larger_than_memory(bytes_of_table(table, self.spec))
        )
        if self.staged is not None and self.staged.records is not None:
            self.staged.records.shards.direct = self._shards.direct

    def _first_copy(self, key: bytes, read: Callable[[OpenShard, Record], T]) -> T | None:
        """What `read` makes of the copy that is served, or of an older one if the shard of that one has vanished.

        Where this store has none, what it makes of the same feature in another store of the directory.
        """
        vanished, snapshot = "", self._now()
        copies = snapshot.table.find(_checked(key))
        if not copies and (elsewhere := self.siblings.find(key, self)) is not None:
            return elsewhere[0]._first_copy(elsewhere[1], read)
        for name, record in copies:
            if self.staged is not None and (local := self.staged.read(record, read)) is not None:
                with self._stats_lock:
                    self._counts["staged_hits"] += 1
                return local
            try:
                return self._read_from(name, record, read)
            except ShardVanishedError as error:
                # An older copy of the same feature may still be there. Kept as text: the error would keep this frame,
                # which keeps the error, and with both the cache and its files.
                vanished = str(error)
            except CorruptRecordError:
                if not self._index_is_wrong(name, record):
                    raise
                with self._lock:
                    if self._snapshot is snapshot:
                        self._snapshot = self._taker.without_index(snapshot)
                return self._first_copy(key, read)
        if vanished:
            raise ShardVanishedError(vanished)
        return None

    def _read_from(self, name: str, record: Record, read: Callable[[OpenShard, Record], T]) -> T:
        try:
            with self._shards.opened(name) as shard:
                return read(shard, record)
        except ShardVanishedError:
            # A file server that was restored knows the file, but not by the handle that was kept open.
            self._shards.pool.forget(name)
            with self._shards.opened(name) as shard:
                return read(shard, record)

    def _feature_of(self, shard: OpenShard, record: Record, out: torch.Tensor | None) -> torch.Tensor:
        shard.stored_bytes(record)  # a record that cannot be there gets no memory
        shape = shape_of(self.spec, record.h, record.w, record.frames)
        if out is None:
            out = empty_feature(self.spec, shape)
        else:
            check_target(out, self.spec, shape)
        shard.read(record, bytes_of(out))
        return out

    def _encoded_of(self, shard: OpenShard, record: Record, out: torch.Tensor | None) -> EncodedFeature:
        from vggt_cache.codec.quantise import EncodedFeature

        memory = bytes_for(shard.stored_bytes(record), out)
        shard.read_stored(record, bytes_of(memory))
        shape = shape_of(self.spec, record.h, record.w, record.frames)
        return EncodedFeature(record=memory, shape=shape)

    def _index_is_wrong(self, shard: str, record: Record) -> bool:
        """Whether the shard itself tells something else about a record than the index did."""
        if not self._taker.use_index:
            return False
        try:
            return record not in self._shards.header(shard).records
        except (ShardFormatError, CacheAccessError):
            return False

    def _bytes_of_frame(self, frame: str | os.PathLike[str] | bytes | bytearray | memoryview) -> bytes:
        if isinstance(frame, (bytes, bytearray, memoryview)):
            return bytes(frame)
        from vggt_cache.frames import read_frame

        return read_frame(os.path.join(self._root or "", frame))

    def _count(self, feature: torch.Tensor | None, seconds: float) -> None:
        with self._stats_lock:
            self._counts["read_s"] += seconds
            self._counts["misses" if feature is None else "hits"] += 1
            self._counts["bytes_read"] += 0 if feature is None else feature.nbytes

    def _warn_of_damage(self, known: tuple[tuple[str, str], ...]) -> None:
        new = [item for item in self.damaged_shards if item not in known]
        if new:
            warnings.warn(
                f"{self.cache_dir}: {len(new)} damaged shard(s), of which only what is provably intact is used, the "
                f"first being: {new[0][1]}; run `vggt-cache prune {self.cache_dir} --damaged --yes`, then precompute "
                "again",
                stacklevel=3,
            )


def _checked(key: bytes) -> bytes:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise SettingsError(
            f"{str(key)[:60]!r} is no key: a key is {KEY_BYTES} bytes, as `key_of` gives them"
        )
    return key


def _listed(frames: Iterable[Frame]) -> list[Frame]:
    try:
        listed = [] if isinstance(frames, (str, bytes, bytearray, memoryview, os.PathLike)) else list(frames)
    except TypeError:
        listed = []
    if not listed:
        raise SettingsError(
            f"frames is {str(frames)[:60]!r}, and a list of frames is needed, such as ['000.png', '003.png']"
        )
    return listed


def _named(frames: Sequence[Frame]) -> str:
    """A frame list in few words: paths by name, all else by what it is."""
    last = frames[-1]
    name = (
        os.fspath(last) if isinstance(last, (str, os.PathLike)) else f"a frame given as {type(last).__name__}"
    )
    return label_of_last([*[""] * (len(frames) - 1), str(name)])


# ---------------------------------------------------------------- after a fork

_ALIVE: weakref.WeakSet[FeatureCache] = weakref.WeakSet()


def _in_child() -> None:
    """A thread that does not exist here may have held the locks."""
    for cache in list(_ALIVE):
        cache._make_locks()
        cache._shards.pool.start_anew_in_child()
        if cache.staged is not None:
            cache.staged.start_anew_in_child()


os.register_at_fork(after_in_child=_in_child)

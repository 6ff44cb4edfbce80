"""The same features under other keys, in the stores of one cache directory that differ in the preprocessing alone.

A feature has one key by the files of its frames, and another by their pixels. It is stored once, under one of them; a
row of the table `same/` says of the other: the feature of this key is that one, in the store of this fingerprint.
    hash: 16 bytes of the key | value: 16 bytes of the other key, first 16 bytes of the store's fingerprint
Who computes features from files has both keys in hand, from one buffer, so a row is true for ever; one whose feature
was removed points to nothing, and a lost one costs a computation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from vggt_cache.errors import StoreError
from vggt_cache.identity import KEY_BYTES, FeatureSpec
from vggt_cache.place import is_url
from vggt_cache.store.directory import list_stores
from vggt_cache.store.filesystem import FileSystem
from vggt_cache.store.rows import RowTable

if TYPE_CHECKING:
    from vggt_cache.store.cache import FeatureCache

FINGERPRINT_BYTES = 16


class SameTable(RowTable):
    """Which keys mean the same feature, of all that the processes of this cache directory have found out."""

    folder, magic = "same", b"VGFCsam1"

    def note(self, pairs: Iterable[tuple[bytes, bytes, FeatureSpec]]) -> None:
        """Of each: a key, the key under which the feature is stored, and the specification of that store."""
        self.append(
            (key, stored + bytes.fromhex(spec.fingerprint)[:FINGERPRINT_BYTES]) for key, stored, spec in pairs
        )

    def stored_under(self, key: bytes) -> tuple[bytes, str] | None:
        """The other key and the first digits of the fingerprint; None where nothing is known."""
        value = self.find(key)
        return None if value is None else (value[:KEY_BYTES], value[KEY_BYTES:].hex())


class Siblings:
    """Where else the features of a cache may be. Looks into other stores only when it is asked for a key."""

    def __init__(self, cache: FeatureCache, fs: FileSystem) -> None:
        self._cache_dir, self._spec, self._fs = cache.cache_dir, cache.spec, fs
        self.lock = threading.Lock()
        self._table: SameTable | None = None
        self._opened: dict[str, FeatureCache | None] = {}
        """By the first digits of the fingerprint; None where there is no such store, or it cannot be read."""

    def find(self, key: bytes, own: FeatureCache) -> tuple[FeatureCache, bytes] | None:
        """The store that has the feature, with its key there: that of given pixels, or the one that the table names."""
        with self.lock:
            given = self._spec.of_given_pixels
            places = [] if given == self._spec else [(key, given.fingerprint[: 2 * FINGERPRINT_BYTES])]
            if self._table is None:
                self._table = SameTable(self._cache_dir)
            if len(self._table) and (row := self._table.stored_under(key)) is not None:
                places.append(row)
            found = [(self._store(fingerprint, own), other) for other, fingerprint in places]
        for store, other in found:
            if store is not None and store.has_own(other):
                return store, other
        return None

    def staged_hits(self) -> int:
        return sum(store.stats.staged_hits for store in list(self._opened.values()) if store is not None)

    def refresh(self) -> None:
        """Take in what has been committed since, and look again for stores that were not there."""
        with self.lock:
            if self._table is not None:
                self._table.reload()
            stores, self._opened = self._opened, {}
            self._opened = {name: store for name, store in stores.items() if store is not None}
        for store in self._opened.values():
            if store is not None:
                store.refresh()

    def close(self) -> None:
        for store in self._opened.values():
            if store is not None:
                store.close()

    def _store(self, fingerprint: str, own: FeatureCache) -> FeatureCache | None:
        if own.spec.fingerprint.startswith(fingerprint):
            return own
        if fingerprint not in self._opened:
            self._opened[fingerprint] = None
            with suppress(StoreError):
                self._opened[fingerprint] = self._open(fingerprint, own)
        return self._opened[fingerprint]

    def _open(self, fingerprint: str, own: FeatureCache) -> FeatureCache | None:
        name = f"{self._spec.context}-{fingerprint[:16]}"
        if not is_url(self._cache_dir) and not os.path.isdir(os.path.join(self._cache_dir, name)):
            return None
        for spec in list_stores(self._cache_dir, self._fs):
            related = spec.of_given_pixels == self._spec.of_given_pixels
            if related and spec.fingerprint.startswith(fingerprint):
                stage = own.staging
                return type(own)(self._cache_dir, spec, root=None, fs=self._fs, io=own.io, stage=stage)
        return None

"""The features of one specification, as a wrapped module uses them: found on the device, or computed and put back."""

from __future__ import annotations

import atexit
import os
import time
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vggt_cache.delivery import ReadAhead, with_retries
from vggt_cache.errors import MissingFeatureError, OutOfMemoryError, StoreError
from vggt_cache.pixel_cache import PixelCache

MISS = ("fill", "encode", "error")
_RECENT = 4
_LOOKUPS_TO_JUDGE = 50
_LOOKUPS_UNTOLD = 2000
"""The same where this process fills an empty cache, and nobody tells it that an epoch is over."""
_HARDLY_ANY = 0.05
_LOOKING_SHARE = 0.05
"""At most so much of the time goes into looking for what others have committed: at first every list is missing."""
Compute = Callable[[Sequence[int]], Sequence[Tensor]]
"""The features, on the device in the dtype of storage, of those of the wanted at these positions."""


class Shelf:
    """`miss`: `fill` stores what is computed, `encode` does not, and with `error` a missing feature is an error.

    A process that was forked opens its own. `close` commits what was computed, and so does the end of the process.
    """

    def __init__(self, store: PixelCache, device: torch.device, *, miss: str, threads: int) -> None:
        self.store, self.miss, self.device = store, miss, device
        self.pid = os.getpid()
        self._reader = ReadAhead(store.cache, device, threads=threads)
        self._put: set[bytes] = set()
        self._gave_up = False
        self._recent: OrderedDict[bytes, Tensor] = OrderedDict()
        """What was computed last, in memory: the step may ask again before it is on disk (activation checkpointing)."""
        self.hits = self.misses = 0
        """Of this epoch, where its ends are told by `flush`; what the same step asks again does not count."""
        self._was_filled = len(store.cache) > 0
        """When this epoch began, as far as that is known."""
        self._judges = miss == "fill" or self._was_filled
        self._look_again_s = 0.0
        """When it is time to look for what others have committed."""
        atexit.register(_close_if_alive, weakref.ref(self))

    def features(self, keys: Sequence[bytes], labels: Sequence[str], compute: Compute) -> list[Tensor]:
        """One for each key, on the device, the caller's own, in the dtype of storage. Equal keys are computed once."""
        asked = sum(key not in self._recent for key in keys)
        found = self._found(keys)
        missing = [at for at, feature in enumerate(found) if feature is None and keys[at] not in keys[:at]]
        self._count(asked, len(missing))
        if missing:
            if self.miss == "error":
                raise MissingFeatureError(
                    f"the feature of {labels[missing[0]]} is not in {self.store.cache.cache_dir} "
                    f'({self.store.spec.short_name}), and miss is "error": precompute it with the same settings, or '
                    'use miss="fill"'
                )
            computed = compute(missing)
            for at, feature in zip(missing, computed, strict=True):
                found[at] = feature
            self._keep([keys[at] for at in missing], computed)
        first = {key: feature for key, feature in zip(keys, found, strict=True) if feature is not None}
        return [
            first[key].clone() if feature is None else feature
            for key, feature in zip(keys, found, strict=True)
        ]

    def flush(self) -> None:
        """What was computed is on disk, and an epoch is over: from the next one on features should be found."""
        self._attempt(self.store.flush)
        self._look_again_s = 0.0
        self._was_filled = len(self.store.cache) > 0
        self.hits = self.misses = 0

    def close(self) -> None:
        """Also of the cache; a forked process leaves that of its parent alone."""
        if self.pid == os.getpid():
            self._attempt(self.store.close)
            self._reader.close()

    # ------------------------------------------------------------ steps

    def _found(self, keys: Sequence[bytes]) -> list[Tensor | None]:
        found = [self._recent[key].clone() if key in self._recent else None for key in keys]
        self._read(keys, found)
        if any(feature is None for feature in found):
            if self._put.intersection(keys):
                self._attempt(self.store.flush)
                self._look_again_s = 0.0
            began_s = time.monotonic()
            if began_s >= self._look_again_s or self.miss == "error":
                self.store.cache.refresh()  # another rank may have them by now
                ended_s = time.monotonic()
                self._look_again_s = ended_s + (ended_s - began_s) / _LOOKING_SHARE
                self._read(keys, found)
        return found

    def _read(self, keys: Sequence[bytes], found: list[Tensor | None]) -> None:
        wanted = [at for at, feature in enumerate(found) if feature is None]
        if self.device.type == "cpu":
            for at in wanted:  # straight into memory of its own
                found[at] = with_retries(partial(self.store.get, keys[at]))
            return
        reads = [self._reader.start(keys[at]) for at in wanted]
        self._reader.settle(reads)
        try:
            for at, read in zip(wanted, reads, strict=True):
                found[at] = self._reader.wait(read)
        finally:
            for read in reads:
                self._reader.release(read)

    def _keep(self, keys: Sequence[bytes], features: Sequence[Tensor]) -> None:
        if self.miss != "fill":
            return
        for key, feature in zip(keys, features, strict=True):
            self._recent[key] = own = feature.clone()  # the caller may write into what it gets
            self._put.add(key)
            self._attempt(self.store.put, [key], own[None])
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)

    def _attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Storing saves later work, and training never depends on it."""
        if self._gave_up:
            return
        try:
            step(*arguments)
        except (StoreError, OSError, OutOfMemoryError) as error:
            self._gave_up = True
            warn(
                "from now on features are computed and not stored, in every epoch again, and training goes on; to have "
                f"them stored, mend this and train or precompute once more: {error}"
            )

    def _count(self, asked: int, missing: int) -> None:
        self.hits += asked - missing
        self.misses += missing
        total = self.hits + self.misses
        enough = _LOOKUPS_TO_JUDGE if self._was_filled else _LOOKUPS_UNTOLD
        if not self._judges or self._gave_up or total < enough:
            return
        self._judges = False
        if self.hits < _HARDLY_ANY * total:
            warn(
                f"of {total} inputs only {self.hits} were found in {self.store.cache.cache_dir}: in the first epoch "
                "over these data that is as it should be, but if this is a later one, or an epoch of this process has "
                f"less than {self.misses}, the images differ from epoch to epoch, as random augmentation, random frame "
                "choice or a changed loader make them, and then a cache only costs; augment after the encoder, make "
                "the choice depend on the sample alone, or train without the cache"
            )


def warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _close_if_alive(shelf: weakref.ref[Shelf]) -> None:
    alive = shelf()
    if alive is not None:
        alive.close()

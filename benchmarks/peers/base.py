"""What a peer must offer to be measured, and the features that it is given to keep.

A peer keeps features under the numbers 0, 1, 2, ...: the simplest key that every one of them takes. All features of
a run have one shape, which is kind to the peers that keep one large array.
"""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch.utils.data import DataLoader, Dataset

POOL = 8
"""Different features that there are, apart from the number that is stamped on each."""
STAMP = 4
"""Values at both ends of a feature whose bits are its number."""
Committed = Callable[[Iterable[int]], None]

# torch says so of every tensor over a bytes object, and nobody writes to a feature here.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What is kept."""

    shape: tuple[int, int, int]
    """[h, w, channels] of every feature, bfloat16."""
    count: int
    per_commit: int
    """Features in a shard, transaction or appended fragment, where the peer has such."""

    @property
    def record_bytes(self) -> int:
        h, w, channels = self.shape
        return 2 * h * w * channels

    @property
    def raw_bytes(self) -> int:
        return self.count * self.record_bytes

    def groups(self) -> Iterable[range]:
        """All numbers in order, `per_commit` at a time."""
        return (
            range(first, min(first + self.per_commit, self.count))
            for first in range(0, self.count, self.per_commit)
        )


@functools.lru_cache(maxsize=2)
def _pool(shape: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(POOL)]


def feature(number: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """The feature [h, w, channels] of a number. It is valid until the next `POOL` have been asked for: a copy for
    each would be timed with the writing."""
    made = _pool(shape)[number % POOL]
    bits = made.view(-1).view(torch.int16)
    bits[:STAMP] = bits[-STAMP:] = torch.tensor([number]).view(torch.int16)
    return made


def number_of(found: torch.Tensor) -> int:
    """The number that is stamped on a feature."""
    return int(found.reshape(-1)[:STAMP].clone().view(torch.int64)[0])


def is_feature(found: torch.Tensor | None, number: int, shape: tuple[int, int, int]) -> bool:
    """Whether these are the very bytes, dtype and shape of the feature of a number."""
    return (
        found is not None
        and found.dtype == torch.bfloat16
        and tuple(found.shape) == shape
        and torch.equal(found.view(torch.int16), feature(number, shape).view(torch.int16))
    )


class Peer(ABC):
    """A way of keeping features in a folder. Making one opens and changes nothing."""

    package: ClassVar[str]
    """Distribution whose version is told."""
    synced: ClassVar[bool]
    """Whether what is reported as committed has been through an fsync (or msync) of the peer's own. The calls were
    looked at with strace."""
    random_access: ClassVar[bool] = True
    start_method: ClassVar[str] = "fork"
    """How worker processes may be started; `forkserver` where the peer's threads do not survive a fork."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    @abstractmethod
    def write(self, committed: Committed) -> None:
        """Keep all features, into an empty folder. Calls `committed` with numbers as soon as the peer has told, by
        returning from the call that is meant for that, that these are kept."""

    @abstractmethod
    def open(self) -> None:
        """Begin reading."""

    @abstractmethod
    def read(self, number: int) -> torch.Tensor | None:
        """The feature of a number in memory of its own, which no file, map or later read shares. Raises or returns
        None where there is none."""

    def read_into(self, number: int, out: torch.Tensor) -> None:
        """The same into the caller's memory, where the peer can do that with less copying than `read`."""
        raise NotImplementedError

    def close(self) -> None:
        """End reading."""
        return

    def batches(self, batch_size: int, workers: int) -> Iterable[Sequence[torch.Tensor]]:
        """Batches for a training loop; each iteration over the result is an epoch in an order of its own."""
        return DataLoader(
            Entries(type(self)(self.folder, self.layout)),
            batch_size=batch_size,
            shuffle=True,
            num_workers=workers,
            collate_fn=list,
            persistent_workers=True,
            multiprocessing_context=self.start_method,
        )

    @classmethod
    def reads_into(cls) -> bool:
        return cls.read_into is not Peer.read_into


class Entries(Dataset[torch.Tensor]):
    """A peer for torch's DataLoader, opened in the worker that uses it."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._is_open = False

    def __len__(self) -> int:
        return self._peer.layout.count

    def __getitem__(self, number: int) -> torch.Tensor:
        if not self._is_open:
            self._peer.open()
            self._is_open = True
        found = self._peer.read(number)
        if found is None:
            raise KeyError(number)
        return found


def payload(found: torch.Tensor) -> memoryview:
    """The bytes of a contiguous feature, without a copy."""
    return memoryview(found.view(-1).view(torch.uint8).numpy())


def from_bytes(data: object, shape: tuple[int, int, int]) -> torch.Tensor:
    """A feature over memory that is its own already, such as a bytes object, without a copy."""
    return torch.frombuffer(data, dtype=torch.bfloat16).view(shape)

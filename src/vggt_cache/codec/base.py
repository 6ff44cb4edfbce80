"""What a codec is."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Cells = TypeVar("Cells", int, npt.NDArray[np.int64])
"""Patches of a feature: h * w; or an array of such numbers."""


class Codec(Protocol):
    """From the bytes of a feature [h, w, C] to those in the file, and back. Keeps nothing of a call.

    Methods may be called from several threads at once.
    """

    name: str
    """As in a shard's header, and in its records' checksums."""

    def prepare(self) -> None:
        """Raises SettingsError where a package that this codec needs is missing."""

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        """The least and the most bytes that a record of so many patches can have in the file."""

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        """The bytes to write. Raises SettingsError for values that it cannot keep."""

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        """Fill `feature`, all of its bytes, from bytes whose checksum was found right.

        Both may be of any alignment. Raises ValueError for bytes that `encode` does not give; `feature` is
        then of any content. Allocates no more than a few pieces, whatever the bytes say.
        """

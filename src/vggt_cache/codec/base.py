"""What a codec is, and the two whose records all have one length. `lossless.py` is the third."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Cells = TypeVar("Cells", int, npt.NDArray[np.int64])
"""Patches of a feature: h * w; or an array of such numbers."""
NORMALISER_BYTES, SCALE_BYTES = 2, 4


class Codec(Protocol):
    """From the bytes of a feature [h, w, C] to those in the file, and back, in several threads at once."""

    name: str
    """As in a shard's header, and in its records' checksums."""

    def prepare(self) -> None:
        """Raises SettingsError where a package that this codec needs is missing."""
        return

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        """The least and the most bytes that a record of so many patches can have in the file."""

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        """The bytes to write. Raises SettingsError for values that it cannot keep."""

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        """Fill `feature`, all of its bytes, from bytes whose checksum was found right.

        Both may be of any alignment. Raises ValueError for bytes that `encode` does not give; `feature` is
        then of any content. Allocates no more than a few pieces, whatever the bytes say.
        """


class Plain(Codec):
    """The bytes as they are, of features of any dtype."""

    name = "none"

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        exact = cells * (channels * self._item_bytes)
        return exact, exact

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        return feature

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        if len(stored) != len(feature):
            raise ValueError("its length does not fit its shape")
        feature[:] = stored


class Int8(Codec):
    """One byte a value: channel-normalised, then one scale per token. About half a percent off, and the spec says so.

    A record of a feature [h, w, C]: the channels' normalisers, bfloat16 [C]; the tokens' scales, float32 [h * w]; the
    values, int8 [h * w, C]. A value is int8 * scale * normaliser, two products in float32, rounded to bfloat16: the
    same bits on every device. The arithmetic is in `quantise.py`, which needs torch and is loaded on first use.
    """

    name = "int8"

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        exact = NORMALISER_BYTES * channels + SCALE_BYTES * cells + cells * channels
        return exact, exact

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        from vggt_cache.codec.quantise import encode_int8, values_of

        record: memoryview = encode_int8(values_of(feature, cells, channels)).numpy().data
        return record

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        from vggt_cache.codec.quantise import bytes_of, decode_rows, values_of

        if len(stored) != self.size_limits(cells, channels)[0]:
            raise ValueError("its length does not fit its shape")
        decode_rows(bytes_of(stored), values_of(feature, cells, channels))

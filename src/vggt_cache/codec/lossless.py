"""Bit-exact: the exponents of bfloat16 through zstandard, signs and mantissas as they are.

A record: the plane of signs and mantissas (one byte a value); a table of the lengths of the frames (u32,
little-endian); the frames, one a piece, each a complete zstandard frame (RFC 8878) of the piece's exponents.
A piece has 2^18 values, the last one what is left, so that what is unpacked stays in the processor's cache.

The planes: a bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. The values of one piece are taken as two halves,
a and b, of equal length. Word i of the exponent plane has the exponents of a[i] (low byte) and b[i] (high byte);
word i of the other plane has a[i] without its exponent, and in the place of the exponent b[i] without its own,
its two bytes swapped. So every step works on whole words, which numpy does at the speed of the processor's cache;
taking every second byte is three times slower.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from vggt_cache.codec.base import Cells, Codec
from vggt_cache.errors import SettingsError

Words = npt.NDArray[np.uint16]
PIECE_VALUES = 1 << 18
_LENGTH_BYTES, _LEAST_FRAME_BYTES = 4, 4
_SLACK_BYTES = 1024
"""What a frame of a piece that does not compress takes beyond the piece, at most: zstd's own bound."""
_EXPONENT, _REST = np.uint16(0x7F80), np.uint16(0x807F)
_LOW, _HIGH = np.uint16(0x00FF), np.uint16(0xFF00)
_SEVEN, _ONE = np.uint16(7), np.uint16(1)
_SWAPPED = np.dtype(np.uint16).newbyteorder()


class Lossless(Codec):
    name = "lossless"

    def prepare(self) -> None:
        _Tools()

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        values = cells * channels
        pieces = -(-values // PIECE_VALUES)
        least = values + pieces * (_LENGTH_BYTES + _LEAST_FRAME_BYTES)
        return least, 2 * values + pieces * (_LENGTH_BYTES + _SLACK_BYTES)

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        values, tools = np.frombuffer(feature, np.uint16), _tools()
        record = np.empty(self.size_limits(cells, channels)[1], np.uint8)
        rest, frames = record[: len(values)].view(np.uint16), []
        for start, stop in _pieces(len(values)):
            half = (stop - start) // 2
            split(values[start:stop], tools.exponents[:half], rest[start // 2 : stop // 2])
            frames.append(tools.compressor.compress(tools.exponents[:half]))
        tail = struct.pack(f"<{len(frames)}I", *map(len, frames)) + b"".join(frames)
        end = len(values) + len(tail)
        record[len(values) : end] = np.frombuffer(tail, np.uint8)
        return record[:end].data

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        values, tools = np.frombuffer(feature, np.uint16), _tools()
        rest = np.frombuffer(stored[: len(values)], np.uint16)
        for (start, stop), frame in zip(_pieces(len(values)), _frames(stored, len(values)), strict=True):
            half = (stop - start) // 2
            exponents = tools.unpack(frame, stop - start)
            join(exponents, rest[start // 2 : stop // 2], values[start:stop], tools.scratch[:half])


def split(values: Words, exponents: Words, rest: Words) -> None:
    """From an even number of values to both planes, each of half as many words."""
    half = len(values) // 2
    a, b = values[:half], values[half:]
    np.bitwise_and(b, _REST, out=exponents)  # used here as scratch
    rest[:] = exponents.view(_SWAPPED)
    np.bitwise_or(rest, a & _REST, out=rest)
    np.left_shift(b, _ONE, out=exponents)
    np.bitwise_and(exponents, _HIGH, out=exponents)
    np.bitwise_or(exponents, (a >> _SEVEN) & _LOW, out=exponents)


def join(exponents: Words, rest: Words, values: Words, scratch: Words) -> None:
    """The inverse of `split`. `scratch` has as many words as a plane."""
    half = len(values) // 2
    a, b = values[:half], values[half:]
    np.left_shift(exponents, _SEVEN, out=scratch)
    np.bitwise_and(scratch, _EXPONENT, out=scratch)
    np.bitwise_and(rest, _REST, out=a)
    np.bitwise_or(a, scratch, out=a)
    np.right_shift(exponents, _ONE, out=scratch)
    np.bitwise_and(scratch, _EXPONENT, out=scratch)
    b[:] = rest.view(_SWAPPED)
    np.bitwise_and(b, _REST, out=b)
    np.bitwise_or(b, scratch, out=b)


def _pieces(count: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + PIECE_VALUES, count)) for start in range(0, count, PIECE_VALUES))


def _frames(stored: memoryview, count: int) -> Iterator[memoryview]:
    """The frames of a record of `count` values. Raises ValueError unless they fill the rest of it exactly."""
    pieces = -(-count // PIECE_VALUES)
    at = count + _LENGTH_BYTES * pieces
    if len(stored) < at:
        raise ValueError("it is shorter than its planes")
    lengths = struct.unpack_from(f"<{pieces}I", stored, count)
    if at + sum(lengths) != len(stored):
        raise ValueError("its frames are not as long as its table says")
    for length in lengths:
        yield stored[at : at + length]
        at += length


class _Tools(threading.local):
    """What one thread reuses: zstandard's contexts are not for several threads at once."""

    def __init__(self) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise SettingsError(
                "the package zstandard, which codec lossless needs, is not installed: pip install "
                "'vggt-feature-cache[codec]'"
            ) from error
        # The smallest table of matches: almost none are found, and what is left is plain Huffman coding. Exponents
        # hardly repeat in sequences: matches would make both directions much slower and gain next to nothing.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            1, hash_log=6, min_match=7, write_content_size=True, write_checksum=False, write_dict_id=False
        )
        self.compressor: Any = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=PIECE_VALUES)
        self._zstandard = zstandard
        self.exponents, self.scratch = (np.empty(PIECE_VALUES // 2, np.uint16) for _ in range(2))

    def unpack(self, frame: memoryview, length: int) -> Words:
        """The exponents in a frame, which must be `length` bytes. Raises ValueError."""
        try:
            # zstandard allocates what a frame claims to hold, so the claim is looked at first.
            if self._zstandard.frame_content_size(frame) != length:
                raise ValueError("a frame's length does not fit its piece")
            return np.frombuffer(self._decompressor.decompress(frame, allow_extra_data=False), np.uint16)
        except self._zstandard.ZstdError as error:
            raise ValueError(f"zstandard refuses a frame: {error}") from error


_tools = cache(_Tools)

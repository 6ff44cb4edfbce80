"""bfloat16 as two planes of bytes: exponents, which compress, and the rest, which does not.

A bfloat16 is a sign, 8 bits of exponent and 7 of mantissa. The values of one piece are taken as two halves, a
and b, of equal length. Word i of the exponent plane has the exponents of a[i] (low byte) and b[i] (high byte);
word i of the other plane has a[i] without its exponent, and in the place of the exponent b[i] without its own,
its two bytes swapped. So every step below works on whole words without a stride, which numpy does at the speed
of the processor's cache; taking every second byte is three times slower.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint16]

_EXPONENT = np.uint16(0x7F80)
_REST = np.uint16(0x807F)
_LOW, _HIGH = np.uint16(0x00FF), np.uint16(0xFF00)
_SEVEN, _ONE = np.uint16(7), np.uint16(1)
_SWAPPED = np.dtype(np.uint16).newbyteorder()


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

"""All textures in one array, each at several levels of detail, sampled with integer arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vggt_cache.demo.pattern import Texture

LEVELS = 8
_RED_BLUE = np.uint32(0x00FF00FF)
_GREEN = np.uint32(0x000000FF)

Floats = npt.NDArray[np.float32]
Packed = npt.NDArray[np.uint32]


class Atlas:
    """Textures packed as 0xRRGGBB; level k of a texture has 2**k times fewer rows and columns."""

    def __init__(self, textures: list[Texture]) -> None:
        pieces: list[Packed] = []
        self._start = np.zeros((len(textures), LEVELS), dtype=np.int32)
        self._row_bits = np.zeros_like(self._start)
        self._column_bits = np.zeros_like(self._start)
        total = 0
        for index, picture in enumerate(textures):
            for level in range(LEVELS):
                self._start[index, level] = total
                self._row_bits[index, level] = picture.shape[0].bit_length() - 1
                self._column_bits[index, level] = picture.shape[1].bit_length() - 1
                pieces.append(_pack(picture))
                total += pieces[-1].size
                picture = _halved(picture)
        self._texels = np.concatenate(pieces)

    def sample(self, texture: npt.NDArray[np.int32], u: Floats, v: Floats, area: Floats) -> Packed:
        """Colours 0xRRGGBB at column `u` and row `v` (texels of level 0), blended from four neighbours.

        `area` is the number of texels that a pixel covers; it decides the level of detail.
        """
        level = np.zeros(area.shape, dtype=np.int32)
        for k in range(1, LEVELS):
            level += area > np.float32(4.0**k / 2)
        column, row = (((c * np.float32(256)).astype(np.int32) >> level) - 128 for c in (u, v))
        flat = texture * np.int32(LEVELS) + level
        start, column_bits = self._start.ravel()[flat], self._column_bits.ravel()[flat]
        column_mask, row_mask = (
            (1 << bits.ravel()[flat]) - 1 for bits in (self._column_bits, self._row_bits)
        )
        left, low = column >> 8, row >> 8
        columns = (left & column_mask, (left + 1) & column_mask)
        rows = (start + ((low & row_mask) << column_bits), start + (((low + 1) & row_mask) << column_bits))
        right_share, high_share = ((c & 255).astype(np.uint32) for c in (column, row))
        near = _blend(self._texels[rows[0] + columns[0]], self._texels[rows[0] + columns[1]], right_share)
        far = _blend(self._texels[rows[1] + columns[0]], self._texels[rows[1] + columns[1]], right_share)
        return _blend(near, far, high_share)


def _pack(picture: Texture) -> Packed:
    wide = picture.astype(np.uint32)
    return np.asarray((wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]).ravel(), dtype=np.uint32)


def _halved(picture: Texture) -> Texture:
    wide = picture.astype(np.uint16)
    return ((wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2) >> 2).astype(np.uint8)


def _blend(first: Packed, second: Packed, share: Packed) -> Packed:
    """first + (second - first) * share / 256 in each colour; red and blue are computed in one word."""
    rest = np.uint32(256) - share
    red_blue = ((first & _RED_BLUE) * rest + (second & _RED_BLUE) * share) >> np.uint32(8)
    green = ((first >> np.uint32(8)) & _GREEN) * rest + ((second >> np.uint32(8)) & _GREEN) * share
    return np.asarray((red_blue & _RED_BLUE) | (green & np.uint32(0x0000FF00)), dtype=np.uint32)

"""What all textures are drawn with: an integer hash, noise, grain, bevels. No floats, so no rounding.

A texture is a uint8 array [rows, columns, 3], both sides powers of two, and repeats without a seam. Row 0 is
the lowest row of a wall.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

TEXELS_PER_METRE = 250
WALL_HEIGHT_M = 2.6

Ints = npt.NDArray[np.int64]
Texture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

WALL = (1024, 512)
FLOOR = (512, 512)
SMALL = (256, 256)
TRIM: Colour = (236, 232, 222)


def hash_grid(x: Ints, y: Ints, salt: int) -> Ints:
    """A well mixed number 0..65535 for each pair of integers."""
    h = (x * 0x9E3779B1 + y * 0x85EBCA77 + salt * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return (h ^ (h >> 15)) & 0xFFFF


def axes(shape: tuple[int, int]) -> tuple[Ints, Ints]:
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    return rows.astype(np.int64), columns.astype(np.int64)


def noise(shape: tuple[int, int], cell: tuple[int, int], salt: int) -> Ints:
    """Smooth values 0..255 that wrap around; `cell` is the distance of the random points in texels."""
    lattice = tuple(side // step for side, step in zip(shape, cell, strict=True))
    points = hash_grid(*axes((lattice[0], lattice[1])), salt) >> 8
    down, right = (np.arange(side) for side in shape)
    r, c = down // cell[0], right // cell[1]
    fr, fc = (down % cell[0])[:, None], (right % cell[1])[None, :]
    r2, c2 = (r + 1) % lattice[0], (c + 1) % lattice[1]
    low = points[np.ix_(r, c)] * (cell[1] - fc) + points[np.ix_(r, c2)] * fc
    high = points[np.ix_(r2, c)] * (cell[1] - fc) + points[np.ix_(r2, c2)] * fc
    return np.asarray((low * (cell[0] - fr) + high * fr) // (cell[0] * cell[1]), dtype=np.int64)


def grain(shape: tuple[int, int], salt: int, strength: int) -> Ints:
    """Brightness of an uneven surface: 256 is neutral, `strength` the largest deviation."""
    fine = hash_grid(*axes(shape), salt) >> 8
    coarse = noise(shape, (64, 64), salt + 1)
    return 256 + (strength * (fine + 2 * coarse - 383)) // 383


def paint(colour: Colour | Ints, brightness: Ints) -> Texture:
    lit = (np.asarray(colour, dtype=np.int64) * brightness[..., None]) >> 8
    return np.asarray(np.clip(lit, 0, 255), dtype=np.uint8)


def pick(colours: list[Colour], index: Ints) -> Ints:
    return np.asarray(np.array(colours, dtype=np.int64)[index % len(colours)])


def bevel(inside_y: Ints, inside_x: Ints, height: int, width: int, depth: int = 30) -> Ints:
    """Brightness of a raised plate: light on the upper edge, dark on the lower and right one."""
    lit = np.where(inside_y >= height - 2, depth, 0) + np.where(inside_x < 2, depth // 2, 0)
    return np.asarray(lit - np.where(inside_y < 2, depth, 0) - np.where(inside_x >= width - 2, depth // 2, 0))


def with_trim(wall: Texture) -> Texture:
    """The wall with a skirting board at its foot and a moulding under the ceiling."""
    top = int(WALL_HEIGHT_M * TEXELS_PER_METRE)
    for start, stop in ((0, 28), (top - 18, top + 2)):
        rows = np.arange(start, stop)
        light = 256 + np.where(rows >= stop - 3, 16, 0) - np.where(rows == stop - 6, 60, 0)
        wall[start:stop] = paint(TRIM, np.broadcast_to(light[:, None], (stop - start, wall.shape[1])))
    wall[28:31] = wall[28:31] // 4 * 3
    return wall

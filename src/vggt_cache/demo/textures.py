"""What the demo house is covered with. Drawn in integers, so that no platform rounds differently.

A texture is uint8 [512, 512, 3], RGB, and repeats without a seam. Row 0 is the lowest. At its natural size it
covers 2.67 m: a wall shows one from the floor to the ceiling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

SIZE, TEXELS_PER_METRE, WALL_HEIGHT_M = 512, 192, 2.6
Y, X = (axis.astype(np.int64) for axis in np.mgrid[0:SIZE, 0:SIZE])

Ints = npt.NDArray[np.int64]
Texture = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]
TRIM: Colour = (236, 232, 222)


def _hash(x: Ints, y: Ints, salt: int) -> Ints:
    """A well mixed number 0..65535 for each pair of integers."""
    h = (x * 0x9E3779B1 + y * 0x85EBCA77 + salt * 0xC2B2AE3D) & 0xFFFFFFFF
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return (h ^ (h >> 15)) & 0xFFFF


def _noise(height: int, width: int, salt: int) -> Ints:
    """Smooth values 0..255 that wrap around; random points lie `height` rows and `width` columns apart."""
    points = _hash(X[: SIZE // height, : SIZE // width], Y[: SIZE // height, : SIZE // width], salt) >> 8
    low, high = (np.repeat(np.roll(points, -i, axis=0), height, axis=0) for i in (0, 1))
    rows = low * (height - Y[:, :1] % height) + high * (Y[:, :1] % height)
    left, right = (np.repeat(np.roll(rows, -i, axis=1), width, axis=1) for i in (0, 1))
    return np.asarray((left * (width - X[:1] % width) + right * (X[:1] % width)) // (height * width))


def _grain(salt: int, strength: int) -> Ints:
    """The brightness of an uneven surface: 256 is neutral, `strength` the largest deviation."""
    return 256 + (strength * ((_hash(X, Y, salt) >> 8) + 2 * _noise(64, 64, salt + 1) - 383)) // 383


def _painted(light: Ints, colour: Colour, other: Colour = TRIM, where: Ints | bool = False) -> Texture:
    """In one colour, and where it is said in the other; a brightness of 256 leaves them as they are."""
    chosen = np.where(np.broadcast_to(where, (SIZE, SIZE))[..., None], other, colour)
    return np.asarray(np.clip(chosen * light[..., None] >> 8, 0, 255), np.uint8)


def _laid(
    colour: Colour, other: Colour = (120, 112, 100), *, height: int, width: int, shift: int = 0, veins: int = 0,
    checker: Colour | None = None, salt: int,
) -> Texture:  # fmt: skip
    """Bricks, tiles or boards with joints of the other colour, each row moved by `shift` (-1: by any length)."""
    row = Y // height
    column = (X + (row * shift if shift >= 0 else _hash(row, row, salt) & -8)) % SIZE
    inside_y, inside_x, column = Y % height, column % width, column // width
    light = _grain(salt, 16) + (_hash(column, row, salt) >> 4) % 56 - 36
    light += 20 * (inside_y >= height - 2) - 20 * (inside_x >= width - 2)
    light += (_noise(2, 64, salt + 2) + _noise(8, 128, salt + 3) - 255) * veins // 255
    joint = (inside_y < 2) | (inside_x < 2)
    pieces = _painted(light, colour, checker or colour, (column + row) % 2 == 1)
    return np.where(joint[..., None], _painted(_grain(salt + 5, 30), other), pieces)


def _striped(colour: Colour, other: Colour, salt: int) -> Texture:
    line = (X % 32 < 2) | (abs(X % 64 - 45.5) < 1)
    dot = (abs(X % 64 - 16) + abs(Y % 64 - 32) < 7) | (abs(X % 64 - 16) * 3 + abs(Y % 64 - 8) < 9)
    return _painted(_grain(salt, 14) - 45 * line + 34 * dot, colour, other, X // 32 % 2 == 1)


def _diamonds(colour: Colour, other: Colour, salt: int) -> Texture:
    across, down = abs(X % 64 - 32), abs(Y % 64 - 32)
    ring, dot = (across + down) // 6, across * across + down * down < 60
    return _painted(_grain(salt, 18) - 20 * (ring == 2) + 90 * dot, colour, other, ring == 4)


def _plaster(colour: Colour, other: Colour, salt: int) -> Texture:
    rough = _noise(16, 16, salt + 2) // 10 + _noise(128, 128, salt + 3) // 8 - 28
    return _painted(_grain(salt, 18) + rough, colour, other, (abs(Y - 402) < 12) & ((X + Y) % 64 < 36))


def _carpet(colour: Colour, other: Colour, salt: int) -> Texture:
    figure = (abs(X % 128 - 64) + abs(Y % 128 - 64)) // 16 == 1
    pile = (_hash(X // 2, Y // 2, salt) >> 8) * 60 // 255 - 30
    return _painted(_grain(salt, 20) + pile, colour, other, figure)


def _trim(salt: int) -> Texture:
    return _painted(_grain(salt, 8), TRIM)


def _window(salt: int) -> Texture:
    """Sky, clouds and a hedge behind a white cross."""
    cloud = np.clip(2 * (_noise(64, 128, salt) + _noise(32, 32, salt + 1) // 3) - 250, 0, 255)[..., None]
    sky = (np.array((246, 250, 255)) * cloud + np.array((136, 188, 240)) * (255 - cloud)) // 255
    hedge = (_noise(SIZE, 32, salt + 2)[:1] // 3 + 120 - Y > 0)[..., None]
    view = np.where(hedge, _painted(190 + _noise(16, 16, salt + 3) // 4, (92, 140, 70)), sky)
    to_edge = SIZE // 2 - np.maximum(abs(X - SIZE // 2), abs(Y - SIZE // 2))
    frame = (to_edge < 28) | (abs(X - 256) < 12) | (abs(Y - 300) < 10)
    return np.where(frame[..., None], _trim(salt), view).astype(np.uint8)


Draw = Callable[..., Texture]
_boards = partial(_laid, height=32, width=256, shift=-1, veins=60)
WALLS: dict[str, Draw] = {
    "red bricks": partial(_laid, (172, 84, 66), (186, 178, 166), height=16, width=64, shift=32),
    "green striped wallpaper": partial(_striped, (176, 196, 160), (210, 216, 188)),
    "blue diamond wallpaper": partial(_diamonds, (150, 172, 200), (96, 124, 168)),
    "wooden panels": partial(_laid, (184, 132, 84), height=64, width=256, shift=64, veins=50),
    "white tiles": partial(_laid, (226, 234, 232), height=32, width=32),
    "yellow plaster": partial(_plaster, (232, 204, 136), (196, 132, 82)),
}
FLOORS: dict[str, Draw] = {
    "oak boards": partial(_boards, (196, 152, 102)),
    "dark boards": partial(_boards, (130, 90, 60), (50, 36, 26)),
    "black and white tiles": partial(_laid, (216, 212, 204), height=128, width=128, checker=(70, 68, 72)),
    "terracotta tiles": partial(_laid, (194, 120, 90), height=64, width=64),
    "grey stone": partial(_laid, (186, 182, 174), height=64, width=128, shift=64),
    "grey carpet": partial(_carpet, (140, 140, 150), (116, 118, 134)),
}
_CEILING = partial(_laid, (246, 244, 236), (206, 204, 198), height=256, width=256)
_ALL: dict[str, Draw] = {**WALLS, **FLOORS, "ceiling": _CEILING, "trim": _trim, "window": _window}
NAMES = tuple(_ALL)


def texture(name: str) -> Texture:
    """The texture of this name, uint8 [512, 512, 3]; a wall's with skirting board and moulding."""
    drawn = _ALL[name](salt=sum(name.encode()))
    if name in WALLS:
        top = int(WALL_HEIGHT_M * TEXELS_PER_METRE)
        for start, stop in ((0, 21), (top - 13, top + 2)):
            light = 256 - 60 * (stop - 5 == Y) + 16 * (stop - 3 <= Y)
            drawn[start:stop] = _painted(light, TRIM)[start:stop]
        drawn[21:24] = drawn[21:24] // 4 * 3
    return drawn

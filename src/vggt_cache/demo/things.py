"""Textures of furniture, pictures and windows. Each takes its colours and a number that varies the pattern."""

from __future__ import annotations

import numpy as np

from vggt_cache.demo.pattern import (
    SMALL,
    TRIM,
    Colour,
    Texture,
    axes,
    bevel,
    grain,
    hash_grid,
    noise,
    paint,
    pick,
)


def wood(colours: list[Colour], salt: int) -> Texture:
    veins = noise(SMALL, (64, 4), salt) // 4 + noise(SMALL, (32, 2), salt + 1) // 6
    return paint(colours[0], 206 + veins + grain(SMALL, salt + 2, 10) - 256)


def lacquer(colours: list[Colour], salt: int) -> Texture:
    """Painted wood: even, with faint brush marks."""
    marks = noise(SMALL, (64, 4), salt) // 24
    return paint(colours[0], 246 + marks + grain(SMALL, salt + 2, 5) - 256)


def leaves(colours: list[Colour], salt: int) -> Texture:
    """Foliage: blades of several greens with dark gaps between them."""
    y, x = axes(SMALL)
    slant = (x + np.where(x // 16 % 2 == 0, y, -y)) % 256
    blade = hash_grid(slant // 8, y // 16, salt)
    vein = abs(slant % 8 - 4) * 14 + abs(y % 16 - 8) * 4
    light = 290 - vein - noise(SMALL, (16, 16), salt + 1) // 3
    return paint(pick(colours, blade), np.where(blade % 7 == 0, 120, light))


def cloth(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(SMALL)
    weave = np.where((x // 2 + y // 2) % 2 == 0, 14, -14)
    seam = np.where((x % 128 < 2) | (y % 128 < 2), -50, 0)
    return paint(colours[0], grain(SMALL, salt, 30) + weave + seam)


def doors(colours: list[Colour], salt: int) -> Texture:
    """A cupboard's front with two doors and knobs."""
    y, x = axes(SMALL)
    inside_x, edge = x % 128, (x % 128 < 3) | (y < 4) | (y >= 252)
    panel = (inside_x > 22) & (inside_x < 106) & (y > 26) & (y < 230)
    light = 210 + noise(SMALL, (64, 4), salt) // 5 + np.where(panel, -14, 0) - np.where(edge, 100, 0)
    light = light + np.where(panel, bevel(230 - y, 105 - inside_x, 203, 83, 50), 0)
    knob = (abs(x - 128) - 12) ** 2 + (y - 130) ** 2 < 30
    return paint(np.where(knob[..., None], np.array((226, 200, 120)), np.array(colours[0])), light)


def books(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(SMALL)
    shelf, inside_y = y // 64, y % 64
    slot = x // 10
    spine = hash_grid(slot, shelf, salt)
    height = 34 + spine % 20
    book = (inside_y >= 6) & (inside_y < 6 + height) & (x >= 8) & (x < 248) & (spine % 11 > 0)
    band = (inside_y > 12 + spine % 9) & (inside_y < 17 + spine % 9)
    light = np.where(book, 230 - abs(x % 10 - 5) * 16 + np.where(band, 60, 0), 60)
    board = (inside_y < 6) | (x < 8) | (x >= 248)
    wood = 190 + noise(SMALL, (4, 64), salt + 1) // 5
    colour = np.where(board[..., None], np.array((148, 104, 66)), pick(colours, spine >> 5))
    return paint(colour, np.where(board, wood, light))


def frame(inner: Texture, colour: Colour, width: int) -> Texture:
    y, x = axes(SMALL)
    nearest = np.minimum(np.minimum(x, 255 - x), np.minimum(y, 255 - y))
    light = 256 + np.where(nearest < width // 3, -40, 20) - np.where(nearest >= width - 3, 90, 0)
    return np.where((nearest < width)[..., None], paint(colour, light), inner)


def landscape(colours: list[Colour], salt: int) -> Texture:
    """Hills before an evening sky."""
    y, x = axes(SMALL)
    sky = paint((238, 196, 150), 270 - y // 3 + noise(SMALL, (16, 64), salt) // 8)
    sun = (x - 60 - salt % 130) ** 2 + (y - 176) ** 2 < 420
    sky[sun] = (252, 232, 170)
    for layer, colour in enumerate(colours):
        line = 150 - 45 * layer + noise(SMALL, (256, 32), salt + 9 * layer)[0] // 4
        light = 200 + (line[None, :] - y) // 2 + noise(SMALL, (4, 8), salt + layer) // 6
        sky = np.where((y < line[None, :])[..., None], paint(colour, light), sky)
    return frame(sky, (150, 108, 52), 18)


def abstract(colours: list[Colour], salt: int) -> Texture:
    """Coloured fields between black bars."""
    y, x = axes(SMALL)
    cuts = [40 + salt % 30, 120 + salt % 17, 190]
    column = sum((x >= cut).astype(np.int64) for cut in cuts) + 0 * x
    row = sum((y >= cut - 12).astype(np.int64) for cut in cuts[::-1]) + 0 * y
    bars = [(abs(x - cut) < 4) | (abs(y - cut + 12) < 4) for cut in cuts]
    colour = pick(colours, hash_grid(column, row, salt) >> 3)
    light = np.where(bars[0] | bars[1] | bars[2], 24, 256)
    return frame(paint(colour, light), (40, 36, 34), 12)


def window(colours: list[Colour], salt: int) -> Texture:
    """Sky, clouds and a hedge behind a white cross."""
    y, x = axes(SMALL)
    cloud = noise(SMALL, (32, 64), salt) + noise(SMALL, (16, 16), salt + 1) // 3
    white = np.clip(2 * cloud - 250, 0, 255)[..., None]
    view = (np.array((246, 250, 255)) * white + np.array((136, 188, 240)) * (255 - white)) // 255
    hedge = y < 60 + noise(SMALL, (256, 16), salt + 2)[0][None, :] // 6
    view = np.where(hedge[..., None], np.array((92, 140, 70)), view)
    picture = paint(view, 216 + y // 6 + np.where(hedge, noise(SMALL, (8, 8), salt + 3) // 4 - 40, 0))
    cross = (abs(x - 128) < 6) | (abs(y - 150) < 5)
    return frame(np.where(cross[..., None], np.array(TRIM, np.uint8), picture), TRIM, 16)

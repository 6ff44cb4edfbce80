"""Textures of walls, floors and ceilings. Each takes its colours and a number that varies the pattern."""

from __future__ import annotations

import numpy as np

from vggt_cache.demo.pattern import (
    FLOOR,
    WALL,
    Colour,
    Texture,
    axes,
    bevel,
    grain,
    hash_grid,
    noise,
    paint,
    pick,
    with_trim,
)


def bricks(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(WALL)
    row = y // 20 % 51
    shifted = (x + row % 2 * 32) % 512
    brick = hash_grid(shifted // 64, row, salt)
    light = grain(WALL, salt, 44) + bevel(y % 20 - 2, shifted % 64 - 2, 18, 62) + (brick >> 4) % 40 - 20
    mortar = (y % 20 < 2) | (shifted % 64 < 2)
    colour = np.where(mortar[..., None], np.array((186, 178, 166)), pick(colours, brick))
    return with_trim(paint(colour, np.where(mortar, grain(WALL, salt + 5, 30), light)))


def stripes(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(WALL)
    colour = pick(colours, x // 32)
    line = (x % 32 < 2) | ((x % 64 > 44) & (x % 64 < 47))
    dot = (abs(x % 64 - 16) + abs(y % 64 - 32) < 7) | (abs(x % 64 - 16) * 3 + abs(y % 64 - 8) < 9)
    light = grain(WALL, salt, 18) - np.where(line, 45, 0) + np.where(dot, 34, 0)
    return with_trim(paint(colour, light))


def diamonds(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(WALL)
    across, down = abs((x % 64) - 32), abs((y % 64) - 32)
    ring = (across + down) // 6
    flower = across * across + down * down < 60
    colour = np.where(
        flower[..., None], np.array(colours[2]), pick(colours[:2], (ring == 4).astype(np.int64))
    )
    return with_trim(paint(colour, grain(WALL, salt, 22) - np.where(ring == 2, 20, 0)))


def panels(colours: list[Colour], salt: int) -> Texture:
    """Wooden panels up to 1 m, plaster above."""
    y, x = axes(WALL)
    inside_x, inside_y = x % 128, y - 50
    frame = (inside_x < 18) | (inside_x >= 110) | (inside_y < 0) | (inside_y >= 170)
    veins = noise(WALL, (128, 4), salt) // 4 + noise(WALL, (64, 2), salt + 2) // 6
    edge = np.where(frame, 0, bevel(170 - 1 - inside_y, 91 - (inside_x - 18), 170, 92, 110))
    wood = 226 + veins - 50 + edge + np.where(frame, 14, -22) + grain(WALL, salt, 10) - 256
    rail = (y >= 238) & (y < 250)
    light = np.where(y < 250, wood + np.where(rail, 26, 0), grain(WALL, salt + 7, 26))
    colour = np.where((y < 250)[..., None], np.array(colours[0]), np.array(colours[1]))
    return with_trim(paint(colour, light - np.where((y >= 250) & (y < 254), 60, 0)))


def tiled_wall(colours: list[Colour], salt: int) -> Texture:
    """Small tiles up to 1.5 m with a coloured border, plaster above."""
    y, x = axes(WALL)
    tile = hash_grid(x // 32, y // 32, salt)
    joint = (x % 32 < 2) | (y % 32 < 2)
    border = (y >= 320) & (y < 352)
    colour = np.where(border[..., None], pick(colours[2:], x // 32 + tile % 2), np.array(colours[0]))
    gloss = 256 + (tile >> 5) % 24 - 12 + bevel(y % 32 - 2, x % 32 - 2, 30, 30, 22)
    light = np.where(joint, 190, gloss + grain(WALL, salt, 10) - 256)
    colour = np.where((y < 384)[..., None], colour, np.array(colours[1]))
    return with_trim(paint(colour, np.where(y < 384, light, grain(WALL, salt + 3, 24))))


def plaster(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(WALL)
    rough = noise(WALL, (16, 16), salt + 2) // 10 + noise(WALL, (128, 128), salt + 3) // 8
    border = (y >= 470) & (y < 500) & ((x + y) % 60 < 34)
    colour = np.where(border[..., None], np.array(colours[1]), np.array(colours[0]))
    return with_trim(paint(colour, grain(WALL, salt, 20) + rough - 28))


# ---------------------------------------------------------------- floors and ceiling


def boards(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(FLOOR)
    board = y // 32
    along = (x + hash_grid(board, board * 0, salt)) % 512
    plank = hash_grid(along // 256, board, salt + 1)
    veins = noise(FLOOR, (2, 64), salt + 2) // 5 + noise(FLOOR, (8, 128), salt + 3) // 5
    joint = (y % 32 < 1) | (along % 256 < 2)
    light = 206 + veins + (plank >> 3) % 44 - 22 - np.where(joint, 110, 0)
    return paint(pick(colours, plank), light + grain(FLOOR, salt, 8) - 256)


def parquet(colours: list[Colour], salt: int) -> Texture:
    """Blocks of four slats, turned by a quarter from block to block."""
    y, x = axes(FLOOR)
    turned = (x // 128 + y // 128) % 2 == 1
    across = np.where(turned, x, y)
    slat = hash_grid(x // 128 * 4 + across % 128 // 32, y // 128, salt)
    veins = np.where(turned, noise(FLOOR, (64, 2), salt + 2), noise(FLOOR, (2, 64), salt + 3)) // 4
    joint = (across % 32 < 1) | (x % 128 < 1) | (y % 128 < 1)
    light = 214 + veins + (slat >> 4) % 40 - 20 - np.where(joint, 100, 0)
    return paint(pick(colours, slat), light + grain(FLOOR, salt, 8) - 256)


def tiles(colours: list[Colour], salt: int, side: int) -> Texture:
    y, x = axes(FLOOR)
    checker = x // side + y // side
    tile = hash_grid(x // side, y // side, salt)
    joint = (x % side < 2) | (y % side < 2)
    cloud = noise(FLOOR, (32, 32), salt + 1) // 7 + noise(FLOOR, (8, 8), salt + 2) // 12
    light = 226 + cloud + (tile >> 4) % 24 - 12 + bevel(y % side - 2, x % side - 2, side - 2, side - 2, 14)
    colour = np.where(joint[..., None], np.array((150, 146, 140)), pick(colours, checker))
    return paint(colour, np.where(joint, 230, light) + grain(FLOOR, salt, 8) - 256)


def carpet(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(FLOOR)
    tuft = (hash_grid(x // 2, y // 2, salt) >> 8) * 60 // 255 - 30
    figure = (abs(x % 128 - 64) + abs(y % 128 - 64)) // 16 == 1
    return paint(pick(colours, figure.astype(np.int64)), grain(FLOOR, salt + 1, 26) + tuft)


def ceiling(colours: list[Colour], salt: int) -> Texture:
    y, x = axes(FLOOR)
    seam = (y % 256 < 2) | (x % 256 < 2)
    return paint(colours[0], grain(FLOOR, salt, 12) - np.where(seam, 26, 0))

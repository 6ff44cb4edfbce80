"""The faces of a house's boxes as arrays, so that a renderer can treat them all at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vggt_cache.demo.house import House
from vggt_cache.demo.pattern import TEXELS_PER_METRE, WALL_HEIGHT_M
from vggt_cache.demo.plan import COLUMNS, Box
from vggt_cache.demo.textures import CATALOGUE, texture

Floats = npt.NDArray[np.float32]
TEXTURE_NAMES = tuple(CATALOGUE)
_SEAM_M = 1e-4
"""Vertical faces are this much too wide, so that no ray slips through between two that meet at a corner."""


@dataclass(frozen=True, kw_only=True)
class Faces:
    """F faces, as arrays over faces. The last 2 * rooms of them are the floors and then the ceilings."""

    axis: npt.NDArray[np.int8]
    """0: a plane of constant x. 1: of constant y. 2: of constant z."""
    sign: Floats
    """Which way the face looks along its axis, -1 or +1."""
    at: Floats
    """The constant coordinate, metres."""
    low: Floats
    """[F, 3] lower bounds of the face, metres."""
    high: Floats
    """[F, 3] upper bounds."""
    texture: npt.NDArray[np.int32]
    """Index into TEXTURE_NAMES."""
    origin: Floats
    """[F, 2] where the texture starts: horizontal and vertical (on floors: x and y), metres."""
    texels: Floats
    """[F, 2] texels a metre, horizontally and vertically."""
    full: npt.NDArray[np.bool_]
    """Whether the face reaches from the floor to the ceiling."""
    labels: tuple[str, ...]
    """What each face belongs to, in words."""
    rooms: int


def room_index(house: House, x: Floats, y: Floats) -> npt.NDArray[np.int32]:
    """Index of the room that each point lies in; points outside belong to the nearest room."""
    columns = sum((x >= np.float32(edge)).astype(np.int32) for edge in house.edges[0][1:-1])
    rows = sum((y >= np.float32(edge)).astype(np.int32) for edge in house.edges[1][1:-1])
    return np.asarray(rows * COLUMNS + columns, dtype=np.int32)


def faces_of(house: House) -> Faces:
    """All faces of all boxes of the house, then one floor and one ceiling for each room."""
    boxes = [(box, axis, side) for box in house.boxes for axis in (0, 1, 2) for side in (0, 1)]
    for z, side in ((0.0, 1), (WALL_HEIGHT_M, 0)):
        for room in house.rooms:
            slab = Box(
                low=(*room.low, z), high=(*room.high, z), sides=("trim",) * 4, caps="ceiling" if z else room.floor,
                label="ceiling" if z else "floor",
            )  # fmt: skip
            boxes.append((slab, 2, side))
    rows = [_row(box, axis, side) for box, axis, side in boxes]
    columns = [np.array(column, dtype=np.float32) for column in zip(*rows, strict=True)]
    axis, sign, at, low, high, texture_index, origin, texels = columns
    return Faces(
        axis=axis.astype(np.int8), sign=sign, at=at, low=low, high=high, texture=texture_index.astype(np.int32),
        origin=origin, texels=texels, full=(low[:, 2] <= 0) & (high[:, 2] >= np.float32(WALL_HEIGHT_M)),
        labels=tuple(box.label for box, _, _ in boxes), rooms=len(house.rooms),
    )  # fmt: skip


def _row(box: Box, axis: int, side: int) -> tuple[object, ...]:
    name = box.caps if axis == 2 else box.sides[2 * axis + side]
    at = (box.high if side else box.low)[axis]
    across, up = ((1, 2), (0, 2), (0, 1))[axis]
    seam = [0.0 if i == axis or i == 2 or axis == 2 else _SEAM_M for i in range(3)]
    low = [value - gap for value, gap in zip(box.low, seam, strict=True)]
    high = [value + gap for value, gap in zip(box.high, seam, strict=True)]
    origin, texels = (0.0, 0.0), (TEXELS_PER_METRE, TEXELS_PER_METRE)
    if box.stretched:
        rows, columns, _ = texture(name).shape
        origin = (box.low[across], box.low[up])
        texels = (
            columns / max(box.high[across] - box.low[across], 0.01),
            rows / max(box.high[up] - box.low[up], 0.01),
        )
    return axis, 2 * side - 1, at, low, high, TEXTURE_NAMES.index(name), origin, texels

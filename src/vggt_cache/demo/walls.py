"""Walls with doorways in them, as boxes."""

from __future__ import annotations

from collections.abc import Iterator

from vggt_cache.demo.pattern import WALL_HEIGHT_M
from vggt_cache.demo.plan import COLUMNS, DOOR_HEIGHT_M, DOOR_WIDTH_M, ROWS, WALL_M, Box, Door, Room

_CASING_M = 0.08
_PROUD_M = 0.02
"""How far a door casing stands out from the wall."""


def wall_boxes(
    edges: tuple[tuple[float, ...], ...], rooms: tuple[Room, ...], doors: tuple[Door, ...]
) -> tuple[Box, ...]:
    """All walls, with a gap, a lintel, a casing and a threshold for each doorway."""
    boxes: list[Box] = []
    for axis, start, stop, across, before, after in _runs(edges, rooms):
        door = next((d for d in doors if before and after and d.rooms == (before.index, after.index)), None)
        papers = (before or after, after or before)
        textures = tuple(room.wall for room in papers if room)
        if door is None:
            boxes.append(_piece(axis, across, (start, stop), (0.0, WALL_HEIGHT_M), textures))
            continue
        left, right = door.middle[1 - axis] - DOOR_WIDTH_M / 2, door.middle[1 - axis] + DOOR_WIDTH_M / 2
        boxes.append(_piece(axis, across, (start, left), (0.0, WALL_HEIGHT_M), textures))
        boxes.append(_piece(axis, across, (right, stop), (0.0, WALL_HEIGHT_M), textures))
        boxes.append(_piece(axis, across, (left, right), (DOOR_HEIGHT_M, WALL_HEIGHT_M), textures))
        boxes.extend(_casing(axis, across, left, right))
    return tuple(boxes)


def _runs(
    edges: tuple[tuple[float, ...], ...], rooms: tuple[Room, ...]
) -> Iterator[tuple[int, float, float, float, Room | None, Room | None]]:
    """Every stretch of wall between two crossings: (axis, start, stop, across, room before, room behind)."""
    counts = (COLUMNS, ROWS)
    for axis in (0, 1):
        step, side_step = (1, COLUMNS) if axis == 0 else (COLUMNS, 1)
        for i, across in enumerate(edges[axis]):
            for j in range(counts[1 - axis]):
                before = rooms[(i - 1) * step + j * side_step] if i > 0 else None
                after = rooms[i * step + j * side_step] if i < counts[axis] else None
                yield axis, edges[1 - axis][j], edges[1 - axis][j + 1], across, before, after


def _oriented(
    axis: int, across: tuple[float, float], along: tuple[float, float], z: tuple[float, float]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    first, second = (across, along) if axis == 0 else (along, across)
    return (first[0], second[0], z[0]), (first[1], second[1], z[1])


def _piece(
    axis: int, across: float, along: tuple[float, float], z: tuple[float, float], papers: tuple[str, ...]
) -> Box:
    low, high = _oriented(axis, (across - WALL_M / 2, across + WALL_M / 2), along, z)
    sides = (*papers, "trim", "trim") if axis == 0 else ("trim", "trim", *papers)
    return Box(low=low, high=high, sides=(sides[0], sides[1], sides[2], sides[3]), caps="trim", label="wall")


def _casing(axis: int, across: float, left: float, right: float) -> Iterator[Box]:
    """The white frame around a doorway, as deep as the wall, and the threshold under it."""
    depth = (across - WALL_M / 2 - _PROUD_M, across + WALL_M / 2 + _PROUD_M)
    lining = 0.015
    posts = ((left - _CASING_M, left + lining), (right - lining, right + _CASING_M))
    parts = [(post, (0.0, DOOR_HEIGHT_M)) for post in posts]
    parts.append(((left - _CASING_M, right + _CASING_M), (DOOR_HEIGHT_M - lining, DOOR_HEIGHT_M + _CASING_M)))
    for along, z in parts:
        low, high = _oriented(axis, depth, along, z)
        yield Box(low=low, high=high, sides=("trim",) * 4, caps="trim", label="doorway")
    low, high = _oriented(axis, (across - WALL_M / 2, across + WALL_M / 2), (left, right), (0.0, 0.005))
    yield Box(low=low, high=high, sides=("walnut",) * 4, caps="walnut", label="threshold", solid=False)

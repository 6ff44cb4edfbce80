"""What stands in the rooms and hangs on their walls; never in the way between two doorways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from vggt_cache.demo.plan import COLUMNS, DOOR_WIDTH_M, HEADROOM_M, ROWS, Box, Door, Point, Room, draw

ROUTE_CLEARANCE_M = 0.45
"""Furniture keeps this distance from the straight lines between a room's centre and its doorways."""

Part = tuple[tuple[float, float], tuple[float, float], tuple[float, float], str, str]
"""Ranges along the wall, away from it and upwards (metres), front texture, texture of the other sides."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """A piece of furniture, described as seen from the wall that it stands at."""

    label: str
    width: float
    depth: float
    parts: tuple[Part, ...]
    stretched: bool = False
    outer_wall: bool = False
    """Only for walls with nothing behind them (windows)."""

    @property
    def z(self) -> tuple[float, float]:
        return min(part[2][0] for part in self.parts), max(part[2][1] for part in self.parts)


def _table(label: str, width: float, depth: float, gap: float) -> Item:
    legs = [
        ((a, a + 0.06), (d, d + 0.06), (0.0, 0.71), "walnut", "walnut")
        for a in (0.04, width - 0.1)
        for d in (gap + 0.04, gap + depth - 0.1)
    ]
    top: Part = ((0.0, width), (gap, gap + depth), (0.71, 0.76), "oak", "oak")
    return Item(label=label, width=width, depth=gap + depth, parts=(*legs, top))


def _chair(cloth: str) -> Item:
    legs = [
        ((a, a + 0.04), (d, d + 0.04), (0.0, 0.42), "walnut", "walnut")
        for a in (0.0, 0.38)
        for d in (0.1, 0.46)
    ]
    seat: Part = ((0.0, 0.42), (0.1, 0.52), (0.42, 0.48), cloth, cloth)
    back: Part = ((0.0, 0.42), (0.08, 0.12), (0.48, 0.95), "walnut", "walnut")
    return Item(label="chair", width=0.42, depth=0.52, parts=(*legs, seat, back))


def _sofa(cloth: str) -> Item:
    parts: tuple[Part, ...] = (
        ((0.0, 1.8), (0.03, 0.85), (0.06, 0.42), cloth, cloth),
        ((0.0, 1.8), (0.03, 0.25), (0.42, 0.86), cloth, cloth),
        ((0.0, 0.2), (0.25, 0.85), (0.42, 0.62), cloth, cloth),
        ((1.6, 1.8), (0.25, 0.85), (0.42, 0.62), cloth, cloth),
        ((0.24, 0.62), (0.25, 0.37), (0.42, 0.74), "linen", "linen"),
    )
    return Item(label="sofa", width=1.8, depth=0.85, parts=parts)


def _bed() -> Item:
    parts: tuple[Part, ...] = (
        ((0.0, 1.4), (0.0, 0.06), (0.0, 1.0), "walnut", "walnut"),
        ((0.0, 1.4), (0.06, 2.0), (0.1, 0.34), "walnut", "walnut"),
        ((0.03, 1.37), (0.06, 1.97), (0.34, 0.52), "linen", "linen"),
        ((0.02, 1.38), (0.6, 1.99), (0.36, 0.56), "blue cloth", "blue cloth"),
        ((0.1, 0.66), (0.1, 0.48), (0.52, 0.64), "linen", "linen"),
        ((0.74, 1.3), (0.1, 0.48), (0.52, 0.64), "linen", "linen"),
    )
    return Item(label="bed", width=1.4, depth=2.0, parts=parts)


def _case(label: str, width: float, depth: float, height: float, front: str, rest: str) -> Item:
    part: Part = ((0.0, width), (0.0, depth), (0.0, height), front, rest)
    return Item(label=label, width=width, depth=depth, parts=(part,), stretched=True)


def _counter() -> Item:
    parts: tuple[Part, ...] = (
        ((0.0, 1.8), (0.0, 0.58), (0.0, 0.86), "kitchen doors", "kitchen doors"),
        ((0.0, 1.8), (0.0, 0.62), (0.86, 0.9), "stone", "stone"),
    )
    return Item(label="counter", width=1.8, depth=0.62, parts=parts)


def _plant() -> Item:
    parts: tuple[Part, ...] = (
        ((0.14, 0.46), (0.14, 0.46), (0.0, 0.34), "clay", "clay"),
        ((0.27, 0.33), (0.27, 0.33), (0.34, 0.7), "walnut", "walnut"),
        ((0.06, 0.54), (0.06, 0.54), (0.62, 0.95), "leaves", "leaves"),
        ((0.12, 0.48), (0.12, 0.48), (0.95, 1.2), "leaves", "leaves"),
        ((0.2, 0.4), (0.2, 0.4), (1.2, 1.36), "leaves", "leaves"),
    )
    return Item(label="plant", width=0.6, depth=0.6, parts=parts)


def _hanging(label: str, width: float, z: tuple[float, float], texture: str) -> Item:
    part: Part = ((0.0, width), (0.0, 0.035), z, texture, "trim" if label == "window" else "walnut")
    return Item(
        label=label, width=width, depth=0.035, parts=(part,), stretched=True, outer_wall=label == "window"
    )


_PILLAR = Item(
    label="pillar", width=0.6, depth=0.6, parts=(((0.2, 0.6), (0.2, 0.6), (0.0, 2.6), "stone", "stone"),)
)
_BOOKSHELF = _case("bookshelf", 1.1, 0.32, 1.95, "books", "oak")
_CUPBOARD = _case("cupboard", 1.2, 0.55, 1.9, "cupboard doors", "oak")
_SIDEBOARD = _case("sideboard", 1.3, 0.45, 0.85, "cupboard doors", "oak")
_FRIDGE = _case("kitchen cabinet", 0.7, 0.6, 1.85, "kitchen doors", "stone")
_WINDOW = _hanging("window", 1.2, (0.85, 2.05), "window")
_LANDSCAPE = _hanging("picture", 1.0, (1.2, 1.9), "landscape")
_ABSTRACT = _hanging("picture", 0.75, (1.15, 1.9), "abstract")

CONTENTS: dict[str, tuple[Item, ...]] = {
    "living room": (_sofa("red cloth"), _BOOKSHELF, _SIDEBOARD, _plant(), _LANDSCAPE, _WINDOW, _ABSTRACT),
    "kitchen": (
        _counter(),
        _FRIDGE,
        _table("table", 1.0, 0.7, 0.0),
        _chair("green cloth"),
        _WINDOW,
        _LANDSCAPE,
    ),
    "bedroom": (_bed(), _CUPBOARD, _chair("blue cloth"), _plant(), _WINDOW, _ABSTRACT),
    "study": (
        _BOOKSHELF,
        _table("desk", 1.3, 0.65, 0.0),
        _BOOKSHELF,
        _chair("red cloth"),
        _WINDOW,
        _LANDSCAPE,
    ),
    "dining room": (
        _table("table", 1.5, 0.8, 0.3),
        _SIDEBOARD,
        _chair("linen"),
        _chair("linen"),
        _WINDOW,
        _LANDSCAPE,
    ),
    "hall": (_PILLAR, _plant(), _CUPBOARD, _sofa("green cloth"), _ABSTRACT, _LANDSCAPE, _WINDOW),
}
_RUGS = ("living room", "bedroom", "study")


def furnish(seed: int, rooms: tuple[Room, ...], doors: tuple[Door, ...]) -> Iterator[Box]:
    """All furniture of the house; a piece that finds no place is left out."""
    for room in rooms:
        yield from _fixed(room)
        placed: list[Box] = []
        own = [door for door in doors if room.index in door.rooms]
        for number, item in enumerate(CONTENTS[room.name]):
            boxes = _place(seed, room, own, item, number, placed)
            placed.extend(boxes)
            yield from boxes


def _fixed(room: Room) -> Iterator[Box]:
    """The lamp under the ceiling and, in some rooms, a rug."""
    x, y = room.centre
    yield _block((x - 0.2, y - 0.2, 2.3), (x + 0.2, y + 0.2, 2.42), "lamp", "lamp")
    yield _block((x - 0.015, y - 0.015, 2.42), (x + 0.015, y + 0.015, 2.6), "lamp", "lamp")
    if room.name in _RUGS:
        yield _block((x - 0.95, y - 0.65, 0.0), (x + 0.95, y + 0.65, 0.012), "rug", "rug")


def _block(
    low: tuple[float, float, float], high: tuple[float, float, float], texture: str, label: str
) -> Box:
    return Box(low=low, high=high, sides=(texture,) * 4, caps=texture, label=label, solid=False)


def _place(seed: int, room: Room, doors: list[Door], item: Item, number: int, placed: list[Box]) -> list[Box]:
    """The item's boxes at the first of 40 drawn places that is free; none if no place is."""
    for attempt in range(40):
        name = f"place/{room.index}/{number}/{attempt}"
        side = draw(seed, f"{name}/side", 4)
        axis = side // 2
        length = room.high[1 - axis] - room.low[1 - axis] - item.width
        if length <= 0 or (item.outer_wall and _has_neighbour(room, side)):
            continue
        offset = length * draw(seed, name, 101) / 100
        boxes = [_oriented(room, side, offset, item, part) for part in item.parts]
        if all(_is_free(box, room, doors, placed) for box in boxes):
            return boxes
    return []


def _has_neighbour(room: Room, side: int) -> bool:
    """Whether another room lies behind the wall on this side (0 west, 1 east, 2 south, 3 north)."""
    row, column = divmod(room.index, COLUMNS)
    return (column > 0, column < COLUMNS - 1, row > 0, row < ROWS - 1)[side]


def _oriented(room: Room, side: int, offset: float, item: Item, part: Part) -> Box:
    """A part of an item that stands at the wall on `side`, `offset` metres from the wall's low end."""
    (a0, a1), (d0, d1), z, front, rest = part
    axis = side // 2
    along = room.low[1 - axis] + offset + a0, room.low[1 - axis] + offset + a1
    wall, inward = (room.low[axis], 1.0) if side % 2 == 0 else (room.high[axis], -1.0)
    away = min(wall + inward * d0, wall + inward * d1), max(wall + inward * d0, wall + inward * d1)
    x, y = (away, along) if axis == 0 else (along, away)
    sides = [rest] * 4
    sides[side ^ 1] = front
    return Box(
        low=(x[0], y[0], z[0]), high=(x[1], y[1], z[1]), sides=(sides[0], sides[1], sides[2], sides[3]),
        caps=rest, label=item.label, solid=item.depth > 0.1, stretched=item.stretched,
    )  # fmt: skip


def _is_free(box: Box, room: Room, doors: list[Door], placed: Iterable[Box]) -> bool:
    inside = all(box.low[i] >= room.low[i] - 1e-6 and box.high[i] <= room.high[i] + 1e-6 for i in (0, 1))
    if not inside or any(_overlap(box, other) for other in placed):
        return False
    if any(_distance(box, door.middle) < DOOR_WIDTH_M / 2 + 0.12 for door in doors):
        return False
    if not box.solid or box.low[2] >= HEADROOM_M:
        return True
    return all(
        _distance(box, point) >= ROUTE_CLEARANCE_M
        for door in doors
        for point in _route(room.centre, door.front(room.index), door.middle)
    )


def _overlap(box: Box, other: Box) -> bool:
    return all(box.low[i] < other.high[i] + 0.04 and other.low[i] < box.high[i] + 0.04 for i in range(3))


def _distance(box: Box, point: Point) -> float:
    gaps = [max(box.low[i] - point[i], point[i] - box.high[i], 0.0) for i in (0, 1)]
    return float((gaps[0] ** 2 + gaps[1] ** 2) ** 0.5)


def _route(*corners: Point) -> Iterator[Point]:
    """Points every few centimetres along straight lines from corner to corner."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        for step in range(41):
            yield x0 + (x1 - x0) * step / 40, y0 + (y1 - y0) * step / 40

"""The floor plan of the demo house: rooms, doorways, and the boxes that everything is made of.

Coordinates are metres: x to the east, y to the north, z up from the floor. A plan is determined by its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from vggt_cache.demo.textures import FLOORS, WALLS

WALL_M = 0.16
DOOR_WIDTH_M = 1.0
DOOR_HEIGHT_M = 2.06
HEADROOM_M = 2.0
"""What begins higher than this is in nobody's way."""
DOOR_FRONT_M = 0.5
"""A doorway is entered from a point this far in front of it."""
COLUMNS, ROWS = 3, 2
ROOM_NAMES = ("living room", "kitchen", "bedroom", "study", "dining room", "hall")

Point = tuple[float, float]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Box:
    """An axis-aligned box, `low` to `high`, with one texture a side."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    sides: tuple[str, str, str, str]
    """Textures of the faces that look west (-x), east (+x), south (-y) and north (+y)."""
    caps: str
    """Texture of the top and the underside."""
    label: str
    """What it is, in words: "bookshelf", "wall"."""
    solid: bool = True
    """Whether a walker must stay clear of it."""
    stretched: bool = False
    """The texture covers each face exactly once instead of being repeated at its natural size."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """One room: inner bounds and what it is called and covered with."""

    index: int
    name: str
    low: Point
    high: Point
    wall: str
    floor: str

    @property
    def centre(self) -> Point:
        return (self.low[0] + self.high[0]) / 2, (self.low[1] + self.high[1]) / 2


@dataclass(frozen=True, kw_only=True)
class Door:
    """A doorway between two neighbouring rooms."""

    rooms: tuple[int, int]
    """Indices of the room to the west or south, and of the one to the east or north."""
    axis: int
    """0: in a wall of constant x. 1: in a wall of constant y."""
    middle: Point

    def front(self, room: int) -> Point:
        """The point inside `room` from which the doorway is entered."""
        distance = (WALL_M / 2 + DOOR_FRONT_M) * (-1 if room == self.rooms[0] else 1)
        x, y = self.middle
        return (x + distance, y) if self.axis == 0 else (x, y + distance)


def draw(seed: int, name: str, below: int) -> int:
    """A number in 0..below-1 that depends on `seed` and `name` alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") % below


def shuffled(seed: int, name: str, items: Sequence[T]) -> list[T]:
    """The items in an order that depends on `seed` and `name` alone."""
    order = sorted(range(len(items)), key=lambda i: hashlib.sha256(f"{seed}/{name}/{i}".encode()).digest())
    return [items[i] for i in order]


def lay_out(
    seed: int,
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]], tuple[Room, ...], tuple[Door, ...]]:
    """Where walls, rooms and doorways are: (edges, rooms, doors)."""
    edges = (_edges(seed, "x", COLUMNS), _edges(seed, "y", ROWS))
    names, walls, floors = (
        shuffled(seed, kind, list(options))
        for kind, options in (("name", ROOM_NAMES), ("wall", WALLS), ("floor", FLOORS))
    )
    rooms = []
    for index in range(COLUMNS * ROWS):
        row, column = divmod(index, COLUMNS)
        low = edges[0][column] + WALL_M / 2, edges[1][row] + WALL_M / 2
        high = edges[0][column + 1] - WALL_M / 2, edges[1][row + 1] - WALL_M / 2
        rooms.append(
            Room(index=index, name=names[index], low=low, high=high, wall=walls[index], floor=floors[index])
        )
    return edges, tuple(rooms), _doors(seed, edges, rooms)


def _edges(seed: int, axis: str, count: int) -> tuple[float, ...]:
    edges = [0.0]
    for i in range(count):
        edges.append(edges[-1] + 3.6 + 0.1 * draw(seed, f"width/{axis}/{i}", 10))
    return tuple(edges)


def _doors(seed: int, edges: tuple[tuple[float, ...], ...], rooms: list[Room]) -> tuple[Door, ...]:
    """A doorway between all neighbours but one pair: in this grid every room then still can be reached."""
    pairs = [(i, i + 1, 0) for i in range(len(rooms)) if (i + 1) % COLUMNS]
    pairs += [(i, i + COLUMNS, 1) for i in range(len(rooms) - COLUMNS)]
    del pairs[draw(seed, "closed", len(pairs))]
    doors = []
    for first, second, axis in pairs:
        along = 1 - axis
        start, stop = rooms[first].low[along], rooms[first].high[along]
        shift = 0.05 * draw(seed, f"door/{first}/{second}", 25) - 0.6
        across = edges[axis][(first % COLUMNS if axis == 0 else first // COLUMNS) + 1]
        place = (start + stop) / 2 + shift
        middle = (across, place) if axis == 0 else (place, across)
        doors.append(Door(rooms=(first, second), axis=axis, middle=middle))
    return tuple(doors)

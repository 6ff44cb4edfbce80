"""The demo house: rooms, doorways, and the boxes that everything in it is made of.

Coordinates are metres: x to the east, y to the north, z up from the floor. A house is determined by its seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from vggt_cache.demo.textures import FLOORS, WALL_HEIGHT_M, WALLS

WALL_M, DOOR_WIDTH_M, DOOR_HEIGHT_M, CASING_M = 0.16, 1.0, 2.06, 0.08
DOOR_FRONT_M = 0.5
"""A doorway is entered from a point this far in front of it."""
COLUMNS, ROWS = 3, 2
ROOM_NAMES = ("living room", "kitchen", "bedroom", "study", "dining room", "hall")

Point = tuple[float, float]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Box:
    """An axis-aligned box, `low` to `high`."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    label: str
    """What it is, in words: "wall", "window"."""
    textures: tuple[str, ...]
    """Of the faces that look west, east, south, north, down and up."""


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


@dataclass(frozen=True)
class House:
    """The house of a seed; equal seeds give equal houses on every platform."""

    seed: int

    def draw(self, name: str, below: int) -> int:
        """A number in 0..below-1 that depends on the seed and `name` alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") % below

    @cached_property
    def edges(self) -> tuple[list[float], list[float]]:
        """Middles of the walls: west to east, and south to north."""
        edges: tuple[list[float], list[float]] = ([0.0], [0.0])
        for axis, count in enumerate((COLUMNS, ROWS)):
            for i in range(count):
                edges[axis].append(edges[axis][-1] + 3.6 + 0.1 * self.draw(f"width/{axis}/{i}", 10))
        return edges

    @cached_property
    def rooms(self) -> tuple[Room, ...]:
        """West to east, the southern row first."""
        names, walls, floors = map(self._shuffled, (ROOM_NAMES, WALLS, FLOORS))
        (x, y), half, rooms = self.edges, WALL_M / 2, []
        for index in range(COLUMNS * ROWS):
            row, column = divmod(index, COLUMNS)
            low, high = (x[column] + half, y[row] + half), (x[column + 1] - half, y[row + 1] - half)
            called = {"name": names[index], "wall": walls[index], "floor": floors[index]}
            rooms.append(Room(index=index, low=low, high=high, **called))
        return tuple(rooms)

    def _shuffled(self, items: Collection[str]) -> list[str]:
        return sorted(items, key=lambda item: self.draw(item, 1 << 62))

    @cached_property
    def doors(self) -> tuple[Door, ...]:
        """A doorway between all neighbours."""
        pairs = [(i, i + 1, 0) for i in range(COLUMNS * ROWS) if (i + 1) % COLUMNS]
        pairs += [(i, i + COLUMNS, 1) for i in range(COLUMNS * (ROWS - 1))]
        doors = []
        for first, second, axis in pairs:
            across = self.rooms[first].high[axis] + WALL_M / 2
            along = self.rooms[first].centre[1 - axis] + 0.05 * self.draw(f"door/{first}/{second}", 25) - 0.6
            middle = (across, along) if axis == 0 else (along, across)
            doors.append(Door(rooms=(first, second), axis=axis, middle=middle))
        return tuple(doors)

    def room_at(self, x: float, y: float) -> Room:
        """The room that the point lies in; a point inside a doorway belongs to the nearer room."""
        column, row = (sum(c >= e for e in edges[1:-1]) for c, edges in zip((x, y), self.edges, strict=True))
        return self.rooms[row * COLUMNS + column]

    def doors_of(self, room: int) -> list[Door]:
        return [door for door in self.doors if room in door.rooms]

    # ------------------------------------------------------------ what it is built of

    @cached_property
    def boxes(self) -> tuple[Box, ...]:
        """Everything that can be seen."""
        of_rooms = (box for room in self.rooms for box in self._room(room))
        return (*of_rooms, *(box for door in self.doors for box in self._inner_wall(door)))

    def _room(self, room: Room) -> Iterator[Box]:
        """Floor and ceiling, to the middle of the walls, so that doorways have both; outer walls with windows."""
        spans = [(room.low[axis] - WALL_M / 2, room.high[axis] + WALL_M / 2) for axis in (0, 1)]
        yield _box("floor", 0, spans[0], spans[1], (-0.1, 0.0), room.floor)
        yield _box("ceiling", 0, spans[0], spans[1], (WALL_HEIGHT_M, WALL_HEIGHT_M + 0.1), "ceiling")
        for axis, end in ((0, 0), (0, -1), (1, 0), (1, -1)):
            if spans[axis][end] == self.edges[axis][end]:
                across, middle = _around(self.edges[axis][end], WALL_M), room.centre[1 - axis]
                yield _box("wall", axis, across, spans[1 - axis], (0.0, WALL_HEIGHT_M), room.wall)
                across = _around(self.edges[axis][end], WALL_M + 0.04)
                yield _box(
                    "window", axis, across, _around(middle, 1.2), (0.95, 2.05), "trim", ("window", "window")
                )

    def _inner_wall(self, door: Door) -> Iterator[Box]:
        """The wall between two rooms, with the white casing of its doorway."""
        axis, middle, (first, second) = door.axis, door.middle, (self.rooms[i] for i in door.rooms)
        start, stop = first.low[1 - axis] - WALL_M / 2, first.high[1 - axis] + WALL_M / 2
        left, right = _around(middle[1 - axis], DOOR_WIDTH_M)
        full, above = (0.0, WALL_HEIGHT_M), (DOOR_HEIGHT_M, WALL_HEIGHT_M)
        for along, z in (((start, left), full), ((right, stop), full), ((left, right), above)):
            yield _box(
                "wall", axis, _around(middle[axis], WALL_M), along, z, "trim", (first.wall, second.wall)
            )
        posts, head = (0.0, DOOR_HEIGHT_M), (DOOR_HEIGHT_M - 0.015, DOOR_HEIGHT_M + CASING_M)
        outer = (left - CASING_M, right + CASING_M)
        for along, z in (
            ((outer[0], left + 0.015), posts),
            ((right - 0.015, outer[1]), posts),
            (outer, head),
        ):
            yield _box("doorway", axis, _around(middle[axis], WALL_M + 0.04), along, z, "trim")


def _around(middle: float, width: float) -> Range:
    return middle - width / 2, middle + width / 2


def _box(
    label: str, axis: int, across: Range, along: Range, z: Range, texture: str, sides: tuple[str, ...] = ()
) -> Box:
    """A box by its extent across and along a wall of constant x (0) or y (1), whose sides may be covered otherwise."""
    x, y = (across, along) if axis == 0 else (along, across)
    low, high = zip(x, y, z, strict=True)
    textures = [texture] * 6
    textures[2 * axis : 2 * axis + len(sides)] = sides
    return Box(low=low, high=high, label=label, textures=tuple(textures))

"""The demo house, of boxes, and walks through it: from room to room through doorways, and the same in words.

Coordinates are metres: x to the east, y to the north, z up from the floor. A house is determined by its seed. Actions
are those of vision-and-language navigation: MOVE_FORWARD 0.25 m, TURN_LEFT and TURN_RIGHT 15 degrees, STOP.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import accumulate, count
from typing import NamedTuple

from vggt_cache.demo.textures import FLOORS, WALL_HEIGHT_M, WALLS

WALL_M, DOOR_WIDTH_M, DOOR_HEIGHT_M, CASING_M = 0.16, 1.0, 2.06, 0.08
DOOR_FRONT_M = 0.5
"""A doorway is entered from a point this far in front of it."""
COLUMNS, ROWS = 3, 2
ROOM_NAMES = ("living room", "kitchen", "bedroom", "study", "dining room", "hall")
ACTIONS = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
"""Names at the places of their numbers."""
TURNS = 24
"""A heading counts turns of 15 degrees to the left, from east."""
_STEP_M, _ARRIVED_M = 0.25, 0.2

Point = tuple[float, float]
Range = tuple[float, float]
_WALL_Z: Range = (0.0, WALL_HEIGHT_M)


class Box(NamedTuple):
    """An axis-aligned box, `low` to `high`."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    label: str
    """What it is, in words: "wall", "window"."""
    textures: tuple[str, ...]
    """Of the faces that look west, east, south, north, down and up."""


@dataclass(frozen=True)
class Room:
    """One room: what it is called and covered with, and its inner bounds."""

    index: int
    name: str
    wall: str
    floor: str
    low: Point
    high: Point

    @property
    def centre(self) -> Point:
        return (self.low[0] + self.high[0]) / 2, (self.low[1] + self.high[1]) / 2


class Door(NamedTuple):
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


class House:
    """The house of a seed; equal seeds give equal houses on every platform."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.edges = [self._edges(axis, rooms) for axis, rooms in enumerate((COLUMNS, ROWS))]
        """Middles of the walls: west to east, and south to north."""
        names, walls, floors = map(self._shuffled, (ROOM_NAMES, WALLS, FLOORS))
        self.rooms = [Room(i, names[i], walls[i], floors[i], *self._bounds(i)) for i in range(COLUMNS * ROWS)]
        """West to east, the southern row first."""
        pairs = [(i, i + 1, 0) for i in range(COLUMNS * ROWS) if (i + 1) % COLUMNS]
        pairs += [(i, i + COLUMNS, 1) for i in range(COLUMNS * (ROWS - 1))]
        self.doors = [self._door(*pair) for pair in pairs]
        """One between all neighbours."""
        self.boxes = [box for room in self.rooms for box in self._room(room)]
        """Everything that can be seen."""
        self.boxes += [box for door in self.doors for box in self._inner_wall(door)]

    def draw(self, name: str, below: int) -> int:
        """A number in 0..below-1 that depends on the seed and `name` alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:8], "little") % below

    def room_at(self, x: float, y: float) -> Room:
        """The room that the point lies in; a point inside a doorway belongs to the nearer room."""
        column, row = (sum(c >= e for e in edges[1:-1]) for c, edges in zip((x, y), self.edges, strict=True))
        return self.rooms[row * COLUMNS + column]

    def doors_of(self, room: int) -> list[Door]:
        return [door for door in self.doors if room in door.rooms]

    def _edges(self, axis: int, rooms: int) -> list[float]:
        widths = (self.draw(f"width/{axis}/{i}", 10) for i in range(rooms))
        return list(accumulate(widths, lambda edge, width: edge + 3.6 + 0.1 * width, initial=0.0))

    def _shuffled(self, items: Collection[str]) -> list[str]:
        return sorted(items, key=lambda item: self.draw(item, 1 << 62))

    def _bounds(self, index: int) -> tuple[Point, Point]:
        (row, column), (x, y), half = divmod(index, COLUMNS), self.edges, WALL_M / 2
        return (x[column] + half, y[row] + half), (x[column + 1] - half, y[row + 1] - half)

    def _door(self, first: int, second: int, axis: int) -> Door:
        across = self.rooms[first].high[axis] + WALL_M / 2
        along = self.rooms[first].centre[1 - axis] + 0.05 * self.draw(f"door/{first}/{second}", 25) - 0.6
        return Door((first, second), axis, (across, along) if axis == 0 else (along, across))

    def _room(self, room: Room) -> Iterator[Box]:
        """Floor and ceiling, to the middle of the walls, so that doorways have both; outer walls with windows."""
        spans = [(room.low[axis] - WALL_M / 2, room.high[axis] + WALL_M / 2) for axis in (0, 1)]
        yield _box("floor", 0, spans[0], spans[1], (-0.1, 0.0), room.floor)
        yield _box("ceiling", 0, spans[0], spans[1], (WALL_HEIGHT_M, WALL_HEIGHT_M + 0.1), "ceiling")
        for axis, end in ((0, 0), (0, -1), (1, 0), (1, -1)):
            edge, along = self.edges[axis][end], spans[1 - axis]
            if spans[axis][end] == edge:
                yield _box("wall", axis, _around(edge, WALL_M), along, _WALL_Z, room.wall)
                across, along = _around(edge, WALL_M + 0.04), _around(room.centre[1 - axis], 1.2)
                yield _box("window", axis, across, along, (0.95, 2.05), "trim", "window", "window")

    def _inner_wall(self, door: Door) -> Iterator[Box]:
        """The wall between two rooms, with the white casing of its doorway."""
        axis, middle, (first, second) = door.axis, door.middle, (self.rooms[i] for i in door.rooms)
        start, stop = first.low[1 - axis] - WALL_M / 2, first.high[1 - axis] + WALL_M / 2
        left, right = _around(middle[1 - axis], DOOR_WIDTH_M)
        across, above = _around(middle[axis], WALL_M), (DOOR_HEIGHT_M, WALL_HEIGHT_M)
        for along, z in (((start, left), _WALL_Z), ((right, stop), _WALL_Z), ((left, right), above)):
            yield _box("wall", axis, across, along, z, "trim", first.wall, second.wall)
        across, outer = _around(middle[axis], WALL_M + 0.04), (left - CASING_M, right + CASING_M)
        for along in ((outer[0], left + 0.015), (right - 0.015, outer[1])):
            yield _box("doorway", axis, across, along, (0.0, DOOR_HEIGHT_M), "trim")
        yield _box("doorway", axis, across, outer, (DOOR_HEIGHT_M - 0.015, DOOR_HEIGHT_M + CASING_M), "trim")


def _around(middle: float, width: float) -> Range:
    return middle - width / 2, middle + width / 2


def _box(label: str, axis: int, across: Range, along: Range, z: Range, texture: str, *sides: str) -> Box:
    """A box by its extent across and along a wall of constant x (0) or y (1), whose sides may be covered otherwise."""
    x, y = (across, along) if axis == 0 else (along, across)
    low, high = zip(x, y, z, strict=True)
    textures = [texture] * 6
    textures[2 * axis : 2 * axis + len(sides)] = sides
    return Box(low, high, label, tuple(textures))


class Pose(NamedTuple):
    """Where the camera stands (metres) and where it looks (`heading` times 15 degrees left of east)."""

    x: float
    y: float
    heading: int

    @property
    def forward(self) -> Point:
        """Unit vector (x, y) of the viewing direction, rounded: libraries' cosines differ in the last bit."""
        angle = math.tau * (self.heading % TURNS) / TURNS
        return round(math.cos(angle), 12), round(math.sin(angle), 12)


class Step(NamedTuple):
    """One step: what is seen from `pose` is seen before `action` is taken."""

    pose: Pose
    action: str
    part: int
    """Index into the episode's `subinstructions`."""


class Episode(NamedTuple):
    """One walk with its instruction."""

    steps: list[Step]
    subinstructions: list[str]

    @property
    def instruction(self) -> str:
        return " ".join(self.subinstructions)

    @property
    def checkpoints(self) -> list[int]:
        """For each subinstruction the index of the frame in which it has been carried out."""
        parts = [step.part for step in self.steps]
        return [*(parts.index(part) for part in range(1, len(self.subinstructions))), len(parts) - 1]


def move(pose: Pose, action: str) -> Pose:
    """The pose after an action."""
    if action == "MOVE_FORWARD":
        forward_x, forward_y = pose.forward
        return pose._replace(x=pose.x + _STEP_M * forward_x, y=pose.y + _STEP_M * forward_y)
    turn = {"TURN_LEFT": 1, "TURN_RIGHT": -1, "STOP": 0}[action]
    return pose._replace(heading=(pose.heading + turn) % TURNS)


def walk(house: House, *, name: str, steps: int) -> Episode:
    """A walk of exactly `steps` frames (2 or more), the last action being STOP, as the house and `name` determine."""
    room = house.draw(f"{name}/room", len(house.rooms))
    route = _route(house, name, room)
    goal, sentence = next(route)
    pose, sentences, path = _start(house, name, room, goal), [sentence], list[Step]()
    while len(path) < steps - 1:
        if math.dist((pose.x, pose.y), goal) <= _ARRIVED_M:
            goal, sentence = next(route)
            sentences.append(sentence)
            continue
        # Turn until the goal is ahead, then walk.
        left = (_heading_to(pose.x, pose.y, goal) - pose.heading) % TURNS
        action = "MOVE_FORWARD" if left == 0 else "TURN_LEFT" if left <= TURNS // 2 else "TURN_RIGHT"
        path.append(Step(pose, action, len(sentences) - 1))
        pose = move(pose, action)
    path.append(Step(pose, "STOP", len(sentences)))
    return Episode(path, [*sentences, f"Stop in the {house.room_at(pose.x, pose.y).name}."])


def _route(house: House, name: str, room: int) -> Iterator[tuple[Point, str]]:
    """Points to reach, each with what is said about it: doorway after doorway, without turning back where it can."""
    came_by: Door | None = None
    for leg in count():
        doors = [door for door in house.doors_of(room) if door is not came_by]
        door = doors[house.draw(f"{name}/leg/{leg}", len(doors))]
        behind = door.rooms[1] if door.rooms[0] == room else door.rooms[0]
        words = house.rooms[behind].name
        yield door.front(room), f"Walk towards the doorway of the {words}."
        yield door.front(behind), f"Go through the doorway into the {words}."
        yield house.rooms[behind].centre, f"Walk towards the middle of the {words}."
        room, came_by = behind, door


def _start(house: House, name: str, room: int, goal: Point) -> Pose:
    """A pose between the room's middle and one of its doorways, turned up to 75 degrees away from the goal."""
    doors = house.doors_of(room)
    front = doors[house.draw(f"{name}/beside", len(doors))].front(room)
    share = house.draw(f"{name}/share", 51) / 100
    x, y = (c + (f - c) * share for c, f in zip(house.rooms[room].centre, front, strict=True))
    turned = (1 + house.draw(f"{name}/offset", 5)) * (1 - 2 * house.draw(f"{name}/side", 2))
    return Pose(x, y, (_heading_to(x, y, goal) + turned) % TURNS)


def _heading_to(x: float, y: float, goal: Point) -> int:
    """The heading that points best from (x, y) to the goal."""
    return round(math.atan2(goal[1] - y, goal[0] - x) / math.tau * TURNS) % TURNS

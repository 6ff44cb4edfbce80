"""Walks through the demo house: from room to room through doorways, and the same in words.

Actions are those of vision-and-language navigation: MOVE_FORWARD 0.25 m, TURN_LEFT and TURN_RIGHT 15 degrees, STOP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from vggt_cache.demo.house import Door, House, Point
from vggt_cache.demo.scene import TURNS, Pose

STEP_M = 0.25
ACTIONS = ("STOP", "MOVE_FORWARD", "TURN_LEFT", "TURN_RIGHT")
"""Names at the places of their numbers."""
_ARRIVED_M = 0.2


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step: what is seen from `pose` is seen before `action` is taken."""

    pose: Pose
    action: str
    part: int
    """Index into the episode's `subinstructions`."""


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One walk with its instruction."""

    steps: tuple[Step, ...]
    subinstructions: tuple[str, ...]

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
        return replace(pose, x=pose.x + STEP_M * forward_x, y=pose.y + STEP_M * forward_y)
    turn = {"TURN_LEFT": 1, "TURN_RIGHT": -1, "STOP": 0}[action]
    return replace(pose, heading=(pose.heading + turn) % TURNS)


def walk(house: House, *, name: str, steps: int) -> Episode:
    """A walk of exactly `steps` frames (2 or more), the last action being STOP, as the house and `name` determine."""
    room = house.draw(f"{name}/room", len(house.rooms))
    route = _route(house, name, room)
    goal, sentence = next(route)
    pose, sentences = _start(house, name, room, goal), [sentence]
    path: list[Step] = []
    while len(path) < steps - 1:
        if math.dist((pose.x, pose.y), goal) <= _ARRIVED_M:
            goal, sentence = next(route)
            sentences.append(sentence)
            continue
        # Turn until the goal is ahead, then walk.
        left = (_heading_to(pose.x, pose.y, goal) - pose.heading) % TURNS
        action = "MOVE_FORWARD" if left == 0 else "TURN_LEFT" if left <= TURNS // 2 else "TURN_RIGHT"
        path.append(Step(pose=pose, action=action, part=len(sentences) - 1))
        pose = move(pose, action)
    path.append(Step(pose=pose, action="STOP", part=len(sentences)))
    sentences.append(f"Stop in the {house.room_at(pose.x, pose.y).name}.")
    return Episode(steps=tuple(path), subinstructions=tuple(sentences))


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
    return Pose(x=x, y=y, heading=(_heading_to(x, y, goal) + turned) % TURNS)


def _heading_to(x: float, y: float, goal: Point) -> int:
    """The heading that points best from (x, y) to the goal."""
    return round(math.atan2(goal[1] - y, goal[0] - x) / math.tau * TURNS) % TURNS

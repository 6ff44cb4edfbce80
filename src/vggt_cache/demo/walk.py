"""Walks through the demo house: from room to room through doorways, and the same in words.

Actions are those of vision-and-language navigation: MOVE_FORWARD 0.25 m, TURN_LEFT and TURN_RIGHT 15 degrees, STOP.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from vggt_cache.demo.camera import TURNS, Pose
from vggt_cache.demo.house import House
from vggt_cache.demo.plan import Door, Point, draw
from vggt_cache.errors import SettingsError

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
    instruction: str
    subinstructions: tuple[str, ...]
    checkpoints: tuple[int, ...]
    """For each subinstruction the index of the frame in which it has been carried out."""


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """The next point to reach."""

    point: Point
    kind: str
    """`approach` a doorway, `enter` through it, or `cross` to the middle of a room."""
    room: int
    """Index of the room that the sentence names."""


def move(pose: Pose, action: str) -> Pose:
    """The pose after an action."""
    if action == "MOVE_FORWARD":
        forward_x, forward_y = pose.forward
        return replace(pose, x=pose.x + STEP_M * forward_x, y=pose.y + STEP_M * forward_y)
    turn = {"TURN_LEFT": 1, "TURN_RIGHT": -1, "STOP": 0}[action]
    return replace(pose, heading=(pose.heading + turn) % TURNS)


def walk(house: House, *, name: str, steps: int) -> Episode:
    """A walk of exactly `steps` frames, the last action being STOP; determined by the house and `name`.

    Raises SettingsError if `steps` is less than 2.
    """
    if steps < 2:
        raise SettingsError(
            f"steps is {steps}, but a walk needs a frame to move in and one to stop in: use 2 or more"
        )
    room = draw(house.seed, f"{name}/room", len(house.rooms))
    route = _route(house, name, room)
    goals = [next(route)]
    pose = _start(house, name, room, goals[0].point)
    path: list[Step] = []
    while len(path) < steps - 1:
        if _distance(pose, goals[-1].point) <= _ARRIVED_M:
            goals.append(next(route))
            continue
        action = _towards(pose, goals[-1].point)
        path.append(Step(pose=pose, action=action, part=len(goals) - 1))
        pose = move(pose, action)
    arrived = _distance(pose, goals[-1].point) <= _ARRIVED_M
    path.append(Step(pose=pose, action="STOP", part=len(goals)))
    return _told(house, path, goals, arrived)


def _route(house: House, name: str, room: int) -> Iterator[_Goal]:
    """Doorway after doorway, without turning back where there is another way."""
    came_by: Door | None = None
    for leg in count():
        doors = [door for door in house.doors_of(room) if door is not came_by] or house.doors_of(room)
        door = doors[draw(house.seed, f"{name}/leg/{leg}", len(doors))]
        behind = door.rooms[1] if door.rooms[0] == room else door.rooms[0]
        yield _Goal(point=door.front(room), kind="approach", room=behind)
        yield _Goal(point=door.front(behind), kind="enter", room=behind)
        yield _Goal(point=house.rooms[behind].centre, kind="cross", room=behind)
        room, came_by = behind, door


def _start(house: House, name: str, room: int, goal: Point) -> Pose:
    """A pose between the room's middle and one of its doorways, turned up to 75 degrees away from the goal."""
    centre = house.rooms[room].centre
    doors = house.doors_of(room)
    front = doors[draw(house.seed, f"{name}/beside", len(doors))].front(room)
    share = draw(house.seed, f"{name}/share", 51) / 100
    x, y = (c + (f - c) * share for c, f in zip(centre, front, strict=True))
    offset = (1 + draw(house.seed, f"{name}/offset", 5)) * (1 - 2 * draw(house.seed, f"{name}/side", 2))
    return Pose(x=x, y=y, heading=(_heading_to(x, y, goal) + offset) % TURNS)


def _heading_to(x: float, y: float, goal: Point) -> int:
    """The heading that points best from (x, y) to the goal."""

    def progress(heading: int) -> float:
        forward = Pose(x=x, y=y, heading=heading).forward
        return (goal[0] - x) * forward[0] + (goal[1] - y) * forward[1]

    return max(range(TURNS), key=progress)


def _distance(pose: Pose, point: Point) -> float:
    return float(((pose.x - point[0]) ** 2 + (pose.y - point[1]) ** 2) ** 0.5)


def _towards(pose: Pose, goal: Point) -> str:
    """The action that leads to the goal: turn until it is ahead, then walk."""
    left = (_heading_to(pose.x, pose.y, goal) - pose.heading) % TURNS
    if left == 0:
        return "MOVE_FORWARD"
    return "TURN_LEFT" if left <= TURNS // 2 else "TURN_RIGHT"


def _told(house: House, path: list[Step], goals: list[_Goal], arrived: bool) -> Episode:
    """The walk with its instruction, one sentence for each goal and one for the stop."""
    sentences = []
    for part, goal in enumerate(goals):
        actions = [step.action for step in path if step.part == part]
        reached = arrived or part < len(goals) - 1
        sentences.append(_sentence(actions, goal.kind, house.rooms[goal.room].name, reached))
    last = path[-1].pose
    sentences.append(f"Stop in the {house.room_at(last.x, last.y).name}.")
    starts = [min(i for i, step in enumerate(path) if step.part == part) for part in range(len(sentences))]
    return Episode(
        steps=tuple(path),
        instruction=" ".join(sentences),
        subinstructions=tuple(sentences),
        checkpoints=(*starts[1:], len(path) - 1),
    )


def _sentence(actions: list[str], kind: str, room: str, reached: bool) -> str:
    left = actions.count("TURN_LEFT") - actions.count("TURN_RIGHT")
    side = "left" if left > 0 else "right"
    turn = "" if left == 0 else f"Turn around to the {side} and " if abs(left) > 8 else f"Turn {side} and "
    verb = {
        "approach": f"walk {'to' if reached else 'towards'} the doorway of the {room}",
        "enter": f"go through the doorway {'into' if reached else 'of'} the {room}",
        "cross": f"walk {'to' if reached else 'towards'} the middle of the {room}",
    }[kind]
    text = turn + verb
    return text[0].upper() + text[1:] + "."

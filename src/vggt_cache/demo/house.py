"""The demo house as a whole: floor plan, walls and furniture, and where a walker can stand."""

from __future__ import annotations

from dataclasses import dataclass

from vggt_cache.demo.furniture import furnish
from vggt_cache.demo.plan import COLUMNS, HEADROOM_M, Box, Door, Room, lay_out
from vggt_cache.demo.walls import wall_boxes


@dataclass(frozen=True, kw_only=True)
class House:
    """Rooms, doorways and every box in them."""

    seed: int
    edges: tuple[tuple[float, ...], tuple[float, ...]]
    """Middles of the walls: west to east, and south to north."""
    rooms: tuple[Room, ...]
    doors: tuple[Door, ...]
    boxes: tuple[Box, ...]

    def clearance(self, x: float, y: float) -> float:
        """Distance in metres from a point on the floor to the nearest solid box; 0 inside one."""
        gaps = (
            max(box.low[0] - x, x - box.high[0], 0.0) ** 2 + max(box.low[1] - y, y - box.high[1], 0.0) ** 2
            for box in self.boxes
            if box.solid and box.low[2] < HEADROOM_M
        )
        return float(min(gaps) ** 0.5)

    def room_at(self, x: float, y: float) -> Room:
        """The room that the point lies in; a point inside a doorway belongs to the nearer room."""
        column = sum(x >= edge for edge in self.edges[0][1:-1])
        row = sum(y >= edge for edge in self.edges[1][1:-1])
        return self.rooms[row * COLUMNS + column]

    def doors_of(self, room: int) -> list[Door]:
        return [door for door in self.doors if room in door.rooms]


def build_house(seed: int) -> House:
    """The house of this seed; equal seeds give equal houses on every platform."""
    edges, rooms, doors = lay_out(seed)
    boxes = (*wall_boxes(edges, rooms, doors), *furnish(seed, rooms, doors))
    return House(seed=seed, edges=edges, rooms=rooms, doors=doors, boxes=boxes)

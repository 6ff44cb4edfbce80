"""The catalogue of textures of the demo house, by names that also describe them in words."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from vggt_cache.demo.pattern import TRIM, Colour, Texture
from vggt_cache.demo.surfaces import (
    boards,
    bricks,
    carpet,
    ceiling,
    diamonds,
    panels,
    parquet,
    plaster,
    stripes,
    tiled_wall,
    tiles,
)
from vggt_cache.demo.things import (
    abstract,
    books,
    cloth,
    doors,
    lacquer,
    landscape,
    leaves,
    window,
    wood,
)

_Recipe = tuple[Callable[[list[Colour], int], Texture], list[Colour]]
_BOOKS: list[Colour] = [
    (156, 52, 48),
    (52, 84, 132),
    (58, 110, 76),
    (196, 160, 84),
    (110, 72, 120),
    (70, 70, 76),
]
_FIELDS: list[Colour] = [(232, 226, 210), (196, 48, 40), (36, 72, 150), (238, 196, 60), (232, 226, 210)]

WALLS: dict[str, _Recipe] = {
    "red bricks": (bricks, [(166, 84, 66), (152, 74, 60), (178, 98, 76), (140, 70, 62)]),
    "green striped wallpaper": (stripes, [(176, 196, 160), (210, 216, 188)]),
    "blue diamond wallpaper": (diamonds, [(150, 172, 200), (96, 124, 168), (236, 226, 190)]),
    "wooden panels": (panels, [(158, 110, 68), (226, 214, 186)]),
    "white tiles": (tiled_wall, [(226, 232, 230), (206, 218, 214), (70, 120, 140), (214, 176, 96)]),
    "yellow plaster": (plaster, [(232, 204, 136), (196, 132, 82)]),
}
FLOORS: dict[str, _Recipe] = {
    "oak boards": (boards, [(188, 144, 94), (176, 132, 84), (198, 156, 106)]),
    "dark boards": (boards, [(122, 82, 56), (110, 72, 50), (132, 92, 62)]),
    "black and white tiles": (lambda c, s: tiles(c, s, 128), [(216, 212, 204), (70, 68, 72)]),
    "terracotta tiles": (lambda c, s: tiles(c, s, 64), [(186, 112, 82), (174, 100, 74), (194, 122, 92)]),
    "parquet": (parquet, [(190, 140, 86), (172, 122, 74), (204, 156, 102)]),
    "grey carpet": (carpet, [(140, 140, 150), (116, 118, 134)]),
}
THINGS: dict[str, _Recipe] = {
    "ceiling": (ceiling, [(240, 238, 230)]),
    "trim": (lacquer, [(236, 232, 222)]),
    "oak": (wood, [(196, 152, 100)]),
    "walnut": (wood, [(116, 76, 50)]),
    "red cloth": (cloth, [(158, 52, 52)]),
    "blue cloth": (cloth, [(66, 92, 140)]),
    "linen": (cloth, [(222, 214, 198)]),
    "green cloth": (cloth, [(78, 116, 82)]),
    "rug": (carpet, [(150, 54, 50), (214, 180, 120)]),
    "leaves": (leaves, [(58, 112, 52), (82, 138, 66), (70, 124, 48), (104, 150, 84)]),
    "clay": (lacquer, [(178, 98, 66)]),
    "stone": (lambda c, s: tiles(c, s, 128), [(196, 194, 190), (186, 184, 178)]),
    "cupboard doors": (doors, [(180, 132, 84)]),
    "kitchen doors": (doors, [(120, 156, 160)]),
    "books": (books, _BOOKS),
    "landscape": (landscape, [(104, 122, 134), (84, 108, 80), (62, 84, 50)]),
    "abstract": (abstract, _FIELDS),
    "window": (window, [TRIM]),
    "lamp": (cloth, [(255, 250, 226)]),
}
CATALOGUE: dict[str, _Recipe] = {**WALLS, **FLOORS, **THINGS}


@lru_cache(maxsize=len(CATALOGUE))
def texture(name: str) -> Texture:
    """The texture `name` of CATALOGUE, uint8 [rows, columns, 3]. Drawn once in a process; do not modify it."""
    draw, colours = CATALOGUE[name]
    return draw(colours, sum(name.encode()))

"""A first-person renderer for the demo house: one ray per pixel, pinhole perspective, numpy only.

The camera never tilts, so all pixels of a column share one vertical plane: boxes are met once per column, and the
rows follow from their heights. On floats only additions, multiplications, divisions and square roots are used, whose
results IEEE 754 fixes: equal houses and poses give equal pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vggt_cache.demo.house import COLUMNS, House, Pose
from vggt_cache.demo.textures import NAMES, SIZE, TEXELS_PER_METRE, WALL_HEIGHT_M, texture

WIDTH, HEIGHT = 640, 480
FOCAL_PIXELS = 388.19
"""79 degrees from left to right on 640 columns, as habitat's cameras for R2R-CE: 320 / tan(39.5 degrees)."""
EYE_M = 1.25
_NEAR_M, _LAMP_Z_M, _CORNER_M = 0.02, 2.25, 0.5
_LEVELS = 8
_LEVEL_START = [4 * len(NAMES) * (SIZE**2 - (SIZE**2 >> 2 * level)) // 3 for level in range(_LEVELS)]
"""Where a level of detail begins among all texels: each has a quarter of the texels of the one before."""

Floats = npt.NDArray[np.float32]
_AMBIENT, _LAMPLIGHT = (np.array(rgb, np.float32) for rgb in ((0.53, 0.55, 0.59), (0.66, 0.61, 0.53)))


class View(NamedTuple):
    """What each pixel shows, before any colour. All arrays are [480, 640]."""

    face: npt.NDArray[np.int32]
    """6 times the index of the box, plus its face: west, east, south, north, down, up."""
    depth: Floats
    """Distance along the viewing direction, metres."""
    position: tuple[Floats, Floats, Floats]
    """The point that is seen: world x, y, z, metres."""
    eye: tuple[float, float, float]
    """Where it is seen from: world x, y, z, metres."""


class Scene:
    """A house that can be looked at."""

    def __init__(self, seed: int) -> None:
        self.house = House(seed)
        boxes = self.house.boxes
        self.labels = np.array([box.label for box in boxes])
        """What each box is, in words."""
        self.textures = np.array([NAMES.index(name) for box in boxes for name in box.textures], np.int32)
        """Of each face: the index of its texture in `textures.NAMES`."""
        self._low, self._high = np.array([(b.low, b.high) for b in boxes], np.float32).swapaxes(0, 1)
        # A window's picture covers it exactly once; all other textures repeat at their natural size.
        stretched = (self.labels == "window")[:, None]
        self._origin = np.where(stretched, self._low, np.float32(0))
        texels = np.where(stretched, SIZE / (self._high - self._low), TEXELS_PER_METRE)
        self._texels_per_metre = texels.astype(np.float32)
        self._texels = _levels_of_detail()
        rooms = [(room.low, 0, room.high, WALL_HEIGHT_M, room.centre, _LAMP_Z_M) for room in self.house.rooms]
        self._rooms = np.array([np.hstack(room) for room in rooms], np.float32).reshape(-1, 3, 3)
        """[rooms, 3, 3]: lower corner, upper corner, lamp."""

    def look(self, pose: Pose) -> View:
        """Trace one ray through the middle of every pixel: eye + depth * (x[column], y[column], rise[row])."""
        (ahead_x, ahead_y), eye = pose.forward, (pose.x, pose.y, EYE_M)
        right = (np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL_PIXELS
        rise = (HEIGHT / 2 - 0.5 - np.arange(HEIGHT)) / FOCAL_PIXELS
        x, y, z = (r.astype(np.float32) for r in (ahead_x + right * ahead_y, ahead_y - right * ahead_x, rise))
        (enter_x, leave_x), (enter_y, leave_y), (enter_z, leave_z) = (
            self._crossings(axis, eye[axis], ray) for axis, ray in enumerate((x, y, z))
        )
        enter, leave = np.maximum(enter_x, enter_y), np.minimum(leave_x, leave_y)  # [boxes, 640]
        side = np.where(enter_x > enter_y, x < 0, 2 + (y < 0))
        depth = np.full((HEIGHT, WIDTH), np.inf, np.float32)
        face = np.zeros((HEIGHT, WIDTH), np.int32)
        met = (enter < leave) & (leave > _NEAR_M)
        for box in np.flatnonzero(met.any(axis=1)):
            columns, rows = _block(met[box]), _block(leave_z[box] > np.maximum(enter_z[box], _NEAR_M))
            across, up = enter[box, columns], enter_z[box, rows, None]
            t = np.maximum(across, up)
            behind = np.minimum(leave[box, columns], leave_z[box, rows, None])
            seen = (t < np.minimum(depth[rows, columns], behind)) & (t > _NEAR_M)
            np.copyto(depth[rows, columns], t, where=seen)
            side_or_cap = 6 * box + np.where(up > across, 4 + (z[rows, None] < 0), side[box, columns])
            np.copyto(face[rows, columns], side_or_cap.astype(np.int32), where=seen)
        position = [np.float32(e) + depth * ray for e, ray in zip(eye, (x, y, z[:, None]), strict=True)]
        return View(face=face, depth=depth, position=(position[0], position[1], position[2]), eye=eye)

    def _crossings(self, axis: int, eye: float, ray: Floats) -> tuple[Floats, Floats]:
        """Depths between which each ray is between the two planes of each box: [boxes, rays]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            first, second = ((end[:, axis, None] - np.float32(eye)) / ray for end in (self._low, self._high))
        return np.minimum(first, second), np.maximum(first, second)

    def picture(self, view: View) -> npt.NDArray[np.uint8]:
        """The colours of what is seen: uint8 [480, 640, 3], RGB."""
        lamp, dim = self._light(view)
        lit = self._texel(view) * (dim[..., None] * (_AMBIENT + lamp[..., None] * _LAMPLIGHT))
        return np.asarray(np.minimum(lit, 255), np.uint8)

    def _texel(self, view: View) -> Floats:
        """The texture's colour, blended from four texels of the level of detail that fits the distance."""
        box, axis = view.face // 6, view.face % 6 // 2
        origin, scale = self._origin[box], self._texels_per_metre[box]
        texels = [(view.position[i] - origin[..., i]) * scale[..., i] * 256 for i in range(3)]
        u, v = np.where(axis == 0, texels[1], texels[0]), np.where(axis == 2, texels[1], texels[2])
        away = np.choose(axis, [abs(p - np.float32(e)) for p, e in zip(view.position, view.eye, strict=True)])
        # A pixel covers depth / focal across, and that times depth / away along the slope of the face.
        across = scale[..., 2] / np.float32(FOCAL_PIXELS)
        area = across * across * view.depth * view.depth * view.depth / away
        level = sum((area > np.float32(4.0**k / 2)).astype(np.int32) for k in range(1, _LEVELS))
        (left, across), (low, up) = (np.divmod((c.astype(np.int32) >> level) - 128, 256) for c in (u, v))
        bits = 9 - level
        start = np.array(_LEVEL_START, np.int32)[level] + (self.textures[view.face] << 2 * bits)
        columns, rows = ([c + i & (1 << bits) - 1 for i in (0, 1)] for c in (left, low))
        four = [self._texels[start + (row << bits) + column] for row in rows for column in columns]
        across, up = (share[..., None] / 256 for share in (across, up))
        near, far = (four[i] + (four[i + 1].astype(np.float32) - four[i]) * across for i in (0, 2))
        return np.asarray(near + (far - near) * up)

    def _light(self, view: View) -> tuple[Floats, Floats]:
        """Lamplight that falls on each pixel, and the factor by which corners dim all light."""
        axis, sign = view.face % 6 // 2, (view.face % 2 * 2 - 1).astype(np.float32)
        # A wall is lit by the lamp of the room that it faces.
        here = [view.position[i] + 0.03 * sign * (axis == i) for i in (0, 1)]
        inner = [np.array(edges[1:-1], np.float32) for edges in self.house.edges]
        column, row = (np.searchsorted(inner[i], here[i], "right") for i in (0, 1))
        low, high, lamp = np.moveaxis(self._rooms[row * COLUMNS + column], (2, 3), (0, 1))
        to_lamp = [lamp[i] - view.position[i] for i in range(3)]
        square = to_lamp[0] * to_lamp[0] + to_lamp[1] * to_lamp[1] + to_lamp[2] * to_lamp[2]
        facing = np.maximum(np.choose(axis, to_lamp) * sign, 0)
        light = facing / np.sqrt(square) * (3.0 / (2.0 + square)) + 0.35
        dim = np.ones_like(square)
        for i in range(3):
            gap = np.minimum(view.position[i] - low[i], high[i] - view.position[i])
            close = np.maximum(1 - gap / _CORNER_M, 0) * (axis != i)
            dim *= 1 - 0.34 * close * close
        shines = (self.labels == "window")[view.face // 6]
        light[shines] = dim[shines] = 1
        return light, dim


def _block(wanted: npt.NDArray[np.bool_]) -> slice:
    """The shortest slice that holds all that are wanted."""
    places = np.flatnonzero(wanted)
    return slice(places[0], places[-1] + 1) if len(places) else slice(0, 0)


def _levels_of_detail() -> npt.NDArray[np.uint8]:
    """[texels, 3] of all textures at their full size, then with half as many rows and columns, and so on."""
    levels, pictures = [], np.stack([texture(name) for name in NAMES])
    for _ in range(_LEVELS):
        levels.append(pictures.reshape(-1, 3))
        four = [pictures[:, i::2, j::2].astype(np.uint16) for i in (0, 1) for j in (0, 1)]
        pictures = ((four[0] + four[1] + four[2] + four[3] + 2) >> 2).astype(np.uint8)
    return np.concatenate(levels)

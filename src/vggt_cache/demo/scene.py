"""A first-person renderer for the demo house: one ray per pixel, pinhole perspective, numpy only.

The camera never tilts, so all pixels of a column share one vertical plane: walls are found once per
column, and the rows that a face covers follow from its heights. On floats only additions, multiplications,
divisions and square roots are used (IEEE 754 fixes their results), and textures are blended in integers:
equal houses and poses give equal pixels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vggt_cache.demo.camera import EYE_M, WIDTH, Floats, Pose, Rays, View
from vggt_cache.demo.faces import Faces, faces_of, room_index
from vggt_cache.demo.house import House, build_house
from vggt_cache.demo.pattern import WALL_HEIGHT_M
from vggt_cache.demo.shading import Shader

_NEAR_M = 0.02


class Scene:
    """A house that can be looked at."""

    def __init__(self, seed: int) -> None:
        self.house: House = build_house(seed)
        self.faces: Faces = faces_of(self.house)
        self._shader = Shader(self.house, self.faces)

    def render(self, pose: Pose) -> npt.NDArray[np.uint8]:
        """What is seen from `pose`: uint8 [480, 640, 3], RGB."""
        return self.picture(self.look(pose))

    def picture(self, view: View) -> npt.NDArray[np.uint8]:
        """The colours of a traced view: uint8 [480, 640, 3], RGB."""
        return self._shader.shade(view)

    def look(self, pose: Pose) -> View:
        """Trace one ray through the middle of every pixel."""
        rays = Rays.of(pose)
        face, depth = _walls(self.faces, rays)
        _flat_faces(self.faces, rays, face, depth)
        x = np.float32(pose.x) + depth * rays.x
        y = np.float32(pose.y) + depth * rays.y
        z = np.float32(EYE_M) + depth * rays.rise[:, None]
        _name_floors(self.house, self.faces, face, x, y, z)
        return View(face=face, depth=depth, position=(x, y, z), eye=rays.eye)


def _walls(faces: Faces, rays: Rays) -> tuple[npt.NDArray[np.int32], Floats]:
    """Face and depth of every pixel as far as vertical faces go; -1 where floor or ceiling shows."""
    indices, hits = _column_hits(faces, rays)
    full = faces.full[indices]
    nearest = hits[full].min(axis=0)
    nearest_face = indices[full][hits[full].argmin(axis=0)].astype(np.int32)
    plane = np.where(rays.rise < 0, np.float32(-EYE_M), np.float32(WALL_HEIGHT_M - EYE_M)) / rays.rise
    depth = np.minimum(plane[:, None], nearest[None, :])
    face = np.where(nearest[None, :] < plane[:, None], nearest_face[None, :], np.int32(-1))
    for index, hit in zip(indices[~full], hits[~full], strict=True):
        columns = np.flatnonzero(hit < nearest)
        if len(columns):
            _paint_upright(faces, int(index), hit, slice(columns[0], columns[-1] + 1), rays, face, depth)
    return face, depth


def _column_hits(faces: Faces, rays: Rays) -> tuple[npt.NDArray[np.intp], Floats]:
    """Depth at which each column meets each vertical face that looks at the eye: indices [n], depths [n, 640]."""
    eye = np.array(rays.eye, dtype=np.float32)
    upright = faces.axis < 2
    towards = (eye[np.minimum(faces.axis, 1)] - faces.at) * faces.sign > 0
    indices = np.flatnonzero(upright & towards)
    hits = []
    for axis, ray, other_ray in ((0, rays.x, rays.y), (1, rays.y, rays.x)):
        chosen = indices[faces.axis[indices] == axis]
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = (faces.at[chosen] - eye[axis])[:, None] / ray
            place = eye[1 - axis] + depth * other_ray
            inside = (place >= faces.low[chosen, 1 - axis, None]) & (
                place <= faces.high[chosen, 1 - axis, None]
            )
            hits.append((chosen, np.where(inside & (depth > _NEAR_M), depth, np.float32(np.inf))))
    return np.concatenate([hits[0][0], hits[1][0]]), np.concatenate([hits[0][1], hits[1][1]])


def _paint_upright(
    faces: Faces, index: int, hit: Floats, columns: slice, rays: Rays,
    face: npt.NDArray[np.int32], depth: Floats,
) -> None:  # fmt: skip
    """Enter one vertical face of limited height where it is nearer than what is there."""
    near = hit[columns][np.isfinite(hit[columns])].min()
    low, high = faces.low[index, 2], faces.high[index, 2]
    rows = _rows_between(rays, (low - EYE_M) / near, (high - EYE_M) / near)
    z = EYE_M + hit[columns] * rays.rise[rows, None]
    seen = (z >= low) & (z <= high) & (hit[columns] < depth[rows, columns])
    np.copyto(depth[rows, columns], hit[columns], where=seen)
    np.copyto(face[rows, columns], np.int32(index), where=seen)


def _rows_between(rays: Rays, low: float, high: float) -> slice:
    """Rows whose rise can lie between two slopes or nearer to the horizon (farther columns are smaller)."""
    rows = np.flatnonzero((rays.rise >= min(low, 0.0)) & (rays.rise <= max(high, 0.0)))
    return slice(rows[0], rows[-1] + 1) if len(rows) else slice(0, 0)


def _flat_faces(faces: Faces, rays: Rays, face: npt.NDArray[np.int32], depth: Floats) -> None:
    """Enter tops below the eye and undersides above it (table tops, lintels)."""
    last = len(faces.axis) - 2 * faces.rooms
    height = faces.at[:last] - np.float32(EYE_M)
    for index in np.flatnonzero((faces.axis[:last] == 2) & (height * faces.sign[:last] < 0)):
        reach = _forward_reach(faces, int(index), rays)
        with np.errstate(divide="ignore"):
            plane = height[index] / rays.rise
        rows = np.flatnonzero((plane > max(_NEAR_M, reach[0])) & (plane <= reach[1]))
        if not len(rows):
            continue
        block = slice(rows[0], rows[-1] + 1)
        t = plane[block, None]
        x, y = np.float32(rays.eye[0]) + t * rays.x, np.float32(rays.eye[1]) + t * rays.y
        low, high = faces.low[index], faces.high[index]
        seen = (x >= low[0]) & (x <= high[0]) & (y >= low[1]) & (y <= high[1]) & (t < depth[block])
        np.copyto(depth[block], t, where=seen)
        np.copyto(face[block], np.int32(index), where=seen)


def _forward_reach(faces: Faces, index: int, rays: Rays) -> tuple[float, float]:
    """Smallest and largest depth of a horizontal face's corners."""
    middle = WIDTH // 2
    forward = (
        float(rays.x[middle - 1] + rays.x[middle]) / 2,
        float(rays.y[middle - 1] + rays.y[middle]) / 2,
    )
    spans = [
        sorted((float(bound[index, i]) - rays.eye[i]) * forward[i] for bound in (faces.low, faces.high))
        for i in (0, 1)
    ]
    return spans[0][0] + spans[1][0] - 0.01, spans[0][1] + spans[1][1] + 0.01


def _name_floors(
    house: House, faces: Faces, face: npt.NDArray[np.int32], x: Floats, y: Floats, z: Floats
) -> None:
    """Replace -1 by the floor or the ceiling of the room that the point lies in."""
    room = room_index(house, x, y)
    first = len(faces.axis) - 2 * faces.rooms
    slab = first + room + np.where(z > EYE_M, faces.rooms, 0)
    np.copyto(face, slab.astype(np.int32), where=face < 0)

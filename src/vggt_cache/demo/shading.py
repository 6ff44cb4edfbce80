"""From faces and depths to colours: textures, one lamp a room, and soft shadows in corners."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from vggt_cache.demo.atlas import Atlas
from vggt_cache.demo.camera import FOCAL_PIXELS, View
from vggt_cache.demo.faces import TEXTURE_NAMES, Faces, room_index
from vggt_cache.demo.house import House
from vggt_cache.demo.pattern import WALL_HEIGHT_M
from vggt_cache.demo.textures import texture

_CELLS_PER_METRE = 100
"""Resolution of the map of shadows on the floor."""
_GLOWING = ("lamp", "window")
_LAMP_Z_M = 2.25
_AMBIENT = (0.53, 0.55, 0.59)
_LAMPLIGHT = (0.66, 0.61, 0.53)
_CORNER_M = 0.5
"""Corners are darker up to this distance."""

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int32]


class Shader:
    """Colours the pixels of one house."""

    def __init__(self, house: House, faces: Faces) -> None:
        self._house = house
        self._faces = faces
        self._atlas = Atlas([texture(name) for name in TEXTURE_NAMES])
        lamps = [(*room.centre, _LAMP_Z_M) for room in house.rooms]
        self._lamps = np.array(lamps, dtype=np.float32)
        self._low = np.array([(*room.low, 0.0) for room in house.rooms], dtype=np.float32)
        self._high = np.array([(*room.high, WALL_HEIGHT_M) for room in house.rooms], dtype=np.float32)
        self._floor_light = _floor_light(house)
        self._glow = np.array([label in _GLOWING for label in faces.labels])

    def shade(self, view: View) -> npt.NDArray[np.uint8]:
        """The picture of what is seen: uint8 [h, w, 3]."""
        texel = self._texels(view)
        lamp, dim = self._light(view)
        planes = []
        for shift, warm, cool in zip((16, 8, 0), _LAMPLIGHT, _AMBIENT, strict=True):
            channel = ((texel >> np.uint32(shift)) & np.uint32(255)).astype(np.float32)
            lit = channel * (dim * (np.float32(cool) + lamp * np.float32(warm)))
            planes.append(np.minimum(lit, np.float32(255)).astype(np.uint8))
        return _softened(np.stack(planes, axis=-1), view.face)

    def _texels(self, view: View) -> npt.NDArray[np.uint32]:
        """Texture colours 0xRRGGBB."""
        faces, face = self._faces, view.face
        x, y, z = view.position
        axis = faces.axis[face]
        across, upward = np.where(axis == 0, y, x), np.where(axis == 2, y, z)
        texels_u, texels_v = faces.texels[face, 0], faces.texels[face, 1]
        away = np.choose(axis, [abs(p - np.float32(e)) for p, e in zip(view.position, view.eye, strict=True)])
        # A pixel covers depth / focal across, and that times depth / away along the slope of the face.
        area = view.depth * view.depth * view.depth / (away * np.float32(FOCAL_PIXELS**2))
        return self._atlas.sample(
            faces.texture[face],
            (across - faces.origin[face, 0]) * texels_u,
            (upward - faces.origin[face, 1]) * texels_v,
            area * (texels_u * texels_v),
        )

    def _light(self, view: View) -> tuple[Floats, Floats]:
        """Lamplight that falls on each pixel, and the factor by which corners dim all light."""
        faces, face = self._faces, view.face
        axis, sign = faces.axis[face], faces.sign[face]
        step = np.float32(0.03) * sign
        room = room_index(
            self._house, view.position[0] + step * (axis == 0), view.position[1] + step * (axis == 1)
        )
        to_lamp = [self._lamps[:, i][room] - view.position[i] for i in range(3)]
        square = to_lamp[0] * to_lamp[0] + to_lamp[1] * to_lamp[1] + to_lamp[2] * to_lamp[2]
        facing = np.maximum(np.choose(axis, to_lamp) * sign, np.float32(0))
        lamp = facing / np.sqrt(square) * (np.float32(3.0) / (np.float32(2.0) + square)) + np.float32(0.35)
        dim = np.ones_like(square)
        for i in range(3):
            gap = np.minimum(
                view.position[i] - self._low[:, i][room], self._high[:, i][room] - view.position[i]
            )
            near = np.maximum(np.float32(1) - gap * np.float32(1 / _CORNER_M), np.float32(0))
            dim *= np.where(axis == i, np.float32(1), np.float32(1) - np.float32(0.34) * near * near)
        floor = np.flatnonzero(face.ravel() >= len(faces.axis) - 2 * faces.rooms)
        dim.reshape(-1)[floor] *= self._shadows(view, floor)
        glow = self._glow[face]
        return np.where(glow, np.float32(1), lamp), np.where(glow, np.float32(1), dim)

    def _shadows(self, view: View, pixels: npt.NDArray[np.intp]) -> Floats:
        """How much light furniture leaves for points of the floor (1 for points of the ceiling)."""
        x, y, z = (axis.ravel()[pixels] for axis in view.position)
        light = self._floor_light
        column = np.clip((x * np.float32(_CELLS_PER_METRE)).astype(np.int32), 0, light.shape[1] - 1)
        row = np.clip((y * np.float32(_CELLS_PER_METRE)).astype(np.int32), 0, light.shape[0] - 1)
        return np.asarray(np.where(z > 1, np.float32(1), light[row, column]))


def _softened(picture: npt.NDArray[np.uint8], face: Indices) -> npt.NDArray[np.uint8]:
    """The picture with the steps of slanted edges smoothed: only pixels between two faces change."""
    edge = np.zeros(face.shape, dtype=np.bool_)
    for near, far in ((np.s_[1:-1, 1:-1], np.s_[2:, 1:-1]), (np.s_[1:-1, 1:-1], np.s_[1:-1, 2:])):
        differs = face[near] != face[far]
        edge[near] |= differs
        edge[far] |= differs
    width = face.shape[1]
    pixels = np.flatnonzero(edge[1:-1, 1:-1]) // (width - 2) * 2  # the border has no neighbours
    pixels = pixels + np.flatnonzero(edge[1:-1, 1:-1]) + width + 1
    flat = picture.reshape(-1, 3)
    wide = flat.astype(np.uint16)
    around = wide[pixels - 1] + wide[pixels + 1] + wide[pixels - width] + wide[pixels + width]
    flat[pixels] = ((wide[pixels] * 4 + around) >> 3).astype(np.uint8)
    return picture


def _floor_light(house: House) -> Floats:
    """Map of the floor, [y, x] in cells: darker below and around what stands on it."""
    size_x, size_y = (int(edges[-1] * _CELLS_PER_METRE) + 1 for edges in house.edges)
    light = np.ones((size_y, size_x), dtype=np.float32)
    for box in house.boxes:
        if not box.solid or box.low[2] > 0.8 or box.label in ("wall", "doorway"):
            continue
        reach, depth = 0.28, 0.5 if box.low[2] < 0.2 else 0.25
        cells = [
            (
                max(int((box.low[i] - reach) * _CELLS_PER_METRE), 0),
                int((box.high[i] + reach) * _CELLS_PER_METRE),
            )
            for i in (0, 1)
        ]
        x = np.arange(*cells[0], dtype=np.float32) / _CELLS_PER_METRE
        y = np.arange(*cells[1], dtype=np.float32)[:, None] / _CELLS_PER_METRE
        gap_x = np.maximum(np.maximum(box.low[0] - x, x - box.high[0]), 0)
        gap_y = np.maximum(np.maximum(box.low[1] - y, y - box.high[1]), 0)
        near = np.maximum(1 - np.sqrt(gap_x * gap_x + gap_y * gap_y) / reach, 0)
        block = light[slice(*cells[1]), slice(*cells[0])]
        block *= (1 - depth * near * near)[: block.shape[0], : block.shape[1]].astype(np.float32)
    return light

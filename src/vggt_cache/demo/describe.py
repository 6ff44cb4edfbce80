"""What a frame shows, in words: landmarks (2D) and distances (3D), read off the traced view."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from vggt_cache.demo.camera import WIDTH, View
from vggt_cache.demo.faces import TEXTURE_NAMES, Faces
from vggt_cache.demo.textures import FLOORS, WALLS

_BACKGROUND = ("wall", "floor", "ceiling", "threshold", "lamp", "rug")
_PLACES = {"ahead": slice(200, 440), "on the left": slice(0, 200), "on the right": slice(440, WIDTH)}
_LEAST_PIXELS = 2500
_EYE_ROWS = slice(220, 260)


@dataclass(frozen=True, kw_only=True)
class Words:
    """A frame in words."""

    landmarks: str
    """What is to be seen, and where in the picture."""
    distances: str
    """How far away it is, metres."""


def describe(faces: Faces, view: View) -> Words:
    """The frame's landmarks and distances as two short texts."""
    things = {place: _thing(faces, view, columns) for place, columns in _PLACES.items()}
    seen = [f"a {thing[0]} {place}" for place, thing in things.items() if thing]
    near = [f"the {thing[0]} {place} is {thing[1]:.1f} m away" for place, thing in things.items() if thing]
    surfaces = (
        f"the walls are {_surface(faces, view, WALLS)} and the floor is {_surface(faces, view, FLOORS)}"
    )
    free = float(view.depth[_EYE_ROWS, WIDTH // 2 - 20 : WIDTH // 2 + 20].min())
    return Words(
        landmarks=_sentence([*seen, surfaces]),
        distances=_sentence([f"at eye level the view ahead is free for {free:.1f} m", *near]),
    )


def _thing(faces: Faces, view: View, columns: slice) -> tuple[str, float] | None:
    """The largest thing between these columns and its distance in metres, or None if there is only wall."""
    labels = np.array(faces.labels)
    pixels = np.bincount(view.face[:, columns].ravel(), minlength=len(labels))
    sizes = {
        str(label): int(pixels[labels == label].sum())
        for label in dict.fromkeys(labels[pixels > 0])
        if label not in _BACKGROUND
    }
    if not sizes or max(sizes.values()) < _LEAST_PIXELS:
        return None
    name = max(sizes, key=lambda label: (sizes[label], label))
    depth = view.depth[:, columns][(labels == name)[view.face[:, columns]]]
    return name, float(depth.min())


def _surface(faces: Faces, view: View, names: Container[str]) -> str:
    """The most frequent texture among `names` in the picture."""
    pixels = np.bincount(faces.texture[view.face].ravel(), minlength=len(TEXTURE_NAMES))
    counts = {name: int(pixels[i]) for i, name in enumerate(TEXTURE_NAMES) if name in names}
    return max(counts, key=lambda name: counts[name])


def _sentence(parts: list[str]) -> str:
    text = ", ".join(parts)
    return text[0].upper() + text[1:] + "."

"""The camera of the demo: where it stands, the ray of each pixel, and what a picture is made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 640, 480
FOCAL_PIXELS = 388.19
"""79 degrees from left to right on 640 columns, as habitat's cameras for R2R-CE: 320 / tan(39.5 degrees)."""
EYE_M = 1.25
TURNS = 24
"""A heading counts turns of 15 degrees to the left, from east."""

Floats = npt.NDArray[np.float32]


def _cosines() -> tuple[float, ...]:
    """cos(15 degrees * k), k = 0..23, from square roots: a library's cosine may differ in the last bit."""
    root2, root3, root6 = 2.0**0.5, 3.0**0.5, 6.0**0.5
    quarter = (1.0, (root6 + root2) / 4, root3 / 2, root2 / 2, 0.5, (root6 - root2) / 4)
    half = (*quarter, 0.0, *(-value for value in quarter[:0:-1]))
    return (*half, *(-value for value in half))


_COSINES = _cosines()


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where the camera stands (metres) and where it looks (`heading` times 15 degrees left of east)."""

    x: float
    y: float
    heading: int

    @property
    def forward(self) -> tuple[float, float]:
        """Unit vector (x, y) of the viewing direction."""
        return _COSINES[self.heading % TURNS], _COSINES[(self.heading - TURNS // 4) % TURNS]


@dataclass(frozen=True, kw_only=True)
class View:
    """What each pixel shows, before any colour. All arrays are [480, 640]."""

    face: npt.NDArray[np.int32]
    """Index into the scene's faces."""
    depth: Floats
    """Distance along the viewing direction, metres."""
    position: tuple[Floats, Floats, Floats]
    """The point that is seen: world x, y, z, metres."""
    eye: tuple[float, float, float]
    """Where it is seen from: world x, y, z, metres."""


@dataclass(frozen=True, kw_only=True)
class Rays:
    """The camera's rays: a point at depth t in (row, column) is eye + t * (x[column], y[column], rise[row])."""

    eye: tuple[float, float, float]
    x: Floats
    y: Floats
    rise: Floats

    @classmethod
    def of(cls, pose: Pose) -> Rays:
        forward_x, forward_y = pose.forward
        right = (np.arange(WIDTH) + 0.5 - WIDTH / 2) / FOCAL_PIXELS
        rise = (HEIGHT / 2 - 0.5 - np.arange(HEIGHT)) / FOCAL_PIXELS
        return cls(
            eye=(pose.x, pose.y, EYE_M),
            x=(forward_x + right * forward_y).astype(np.float32),
            y=(forward_y - right * forward_x).astype(np.float32),
            rise=rise.astype(np.float32),
        )

"""The picture that shows at a glance whether features are right: frames beside their features as colours.

All features share one basis: the three directions of largest variance (PCA) over the patches of all of
them, as red, green and blue. Equal surfaces then have equal colours in all pictures; features of another
frame, a transposed grid or noise are seen at once.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from vggt_cache.errors import SettingsError, StoreError, os_errors_as

Pixels = npt.NDArray[np.uint8]
Feature = npt.NDArray[np.float32]


class Row(NamedTuple):
    """What stands together in a picture."""

    pixels: Pixels
    """Of the frame [H, W, 3]"""
    feature: Feature
    """[h, w, C]"""
    caption: str
    seen: Sequence[Pixels] = ()
    """Earlier frames that the encoder saw, in order: drawn small below, the first and the latest of many."""


MAX_PICTURE_PIXELS = 100_000_000

_PERCENTILES = (1.0, 99.0)
_NOISE = 1e-10
"""Share of the largest variance under which a component is rounding, not signal."""
_FLOAT32_NOISE = 1e-14
"""Share of the mean square under which a variance is what float32 makes of a constant."""
_GREY = 0.5
_BASIS_PATCHES = 8192
"""Bounds the time and memory of the PCA; a basis from so many patches is steady."""
_MARGIN_PIXELS = 8
_CAPTION_PIXELS = 16
_SEEN_PIXELS = 32
"""The height of an earlier frame."""
_ROWS_PER_COLUMN = 4
_FORMATS = {"": "PNG", ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "uming.ttc",
)
"""That have Chinese letters; the system's folders are searched for them."""


def draw_features(rows: Sequence[Row], out_path: str | os.PathLike[str]) -> None:
    """Write a PNG, or by its name a JPEG, with each frame, its feature enlarged to the frame's size, and its caption.

    Equal rows give equal bytes on one machine. Raises SettingsError for arguments that make no picture, and
    StoreError for features that hold NaN or infinity.
    """
    rows = [Row(*row) for row in rows]
    kind = picture_format(out_path)
    _check(rows)
    buffer = io.BytesIO()
    _picture(rows, joint_colours([row.feature for row in rows])).save(buffer, kind, quality=95)
    fault = f"the picture cannot be written to {os.fspath(out_path)}"
    with os_errors_as(SettingsError, fault, ": give a file name in a folder that you can write to"):
        Path(out_path).write_bytes(buffer.getvalue())


def picture_format(out_path: str | os.PathLike[str]) -> str:
    """Pillow's name of the format that a file's name stands for. Raises SettingsError for others than PNG and JPEG."""
    suffix = os.path.splitext(out_path)[1]
    if suffix.lower() not in _FORMATS:
        raise SettingsError(
            f"the picture cannot be written to {os.fspath(out_path)}: {suffix} is no format of it; end the name in "
            ".png or .jpg"
        )
    return _FORMATS[suffix.lower()]


def joint_colours(features: Sequence[Feature]) -> list[Pixels]:
    """Features [h, w, C] as colours uint8 [h, w, 3] by one PCA over the patches of all of them.

    A component's sign is such that its largest entry is positive. Its 1st to 99th percentile spans the range
    of its colour, so that a few outlying patches do not darken the rest. Components without variance are grey.
    """
    patches = _spread_patches(features)
    mean = patches.mean(axis=0)
    directions = _principal_directions(patches - mean, _FLOAT32_NOISE * float(np.mean(patches**2)))
    scores = [(feature.astype(np.float64) - mean) @ directions for feature in features]  # [h, w, 3] each
    low, high = np.percentile(np.concatenate([one.reshape(-1, 3) for one in scores]), _PERCENTILES, axis=0)
    flat = high <= low
    span = np.where(flat, 1.0, high - low)
    shades = (np.where(flat, _GREY, (one - low) / span) for one in scores)
    return [np.rint(shade.clip(0.0, 1.0) * 255).astype(np.uint8) for shade in shades]


def _spread_patches(features: Sequence[Feature]) -> npt.NDArray[np.float64]:
    """Patches [n, C] for the basis: all, or evenly spaced ones where there are more than the basis needs."""
    total = sum(feature.shape[0] * feature.shape[1] for feature in features)
    step = -(-total // _BASIS_PATCHES)
    rows = [feature.reshape(-1, feature.shape[-1])[::step] for feature in features]
    return np.concatenate(rows).astype(np.float64)


def _principal_directions(patches: npt.NDArray[np.float64], noise: float) -> npt.NDArray[np.float64]:
    """Eigenvectors [C, 3] of the covariance with the largest eigenvalues; zeros where only noise is left."""
    variances, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    directions = np.zeros((patches.shape[1], 3))
    for component, (variance, vector) in enumerate(zip(variances[:-4:-1], vectors.T[:-4:-1], strict=True)):
        if variance > max(_NOISE * variances[-1], noise):
            directions[:, component] = vector * np.sign(vector[np.abs(vector).argmax()])
    return directions


class _Table:
    """Where things stand in the picture: cells of equal size, filled downwards, then to the right. All in pixels."""

    def __init__(self, rows: Sequence[Row]) -> None:
        frames = [row.pixels for row in rows]
        seen_pixels = _SEEN_PIXELS + 2 if any(row.seen for row in rows) else 0
        columns = math.ceil(len(frames) / max(_ROWS_PER_COLUMN, math.isqrt(2 * len(frames))))
        self._rows = math.ceil(len(frames) / columns)
        self.frame_height = max(pixels.shape[0] for pixels in frames)
        self.frame_width = max(pixels.shape[1] for pixels in frames)
        # A cell is a frame, its feature, its caption, and the margins right of and below them.
        self._width = 2 * (self.frame_width + _MARGIN_PIXELS)
        self._height = self.frame_height + _CAPTION_PIXELS + seen_pixels + _MARGIN_PIXELS
        self.size = columns * self._width + _MARGIN_PIXELS, self._rows * self._height + _MARGIN_PIXELS

    def corner(self, index: int) -> tuple[int, int]:
        """(x, y) of a cell."""
        column, row = divmod(index, self._rows)
        return _MARGIN_PIXELS + column * self._width, _MARGIN_PIXELS + row * self._height


def _picture(rows: Sequence[Row], colours: Sequence[Pixels]) -> Image.Image:
    table = _Table(rows)
    canvas = Image.new("RGB", table.size, "white")
    draw = ImageDraw.Draw(canvas)
    for index, (row, colour) in enumerate(zip(rows, colours, strict=True)):
        x, y = table.corner(index)
        frame = Image.fromarray(row.pixels)
        canvas.paste(frame, (x, y))
        enlarged = Image.fromarray(colour).resize(frame.size, Image.Resampling.NEAREST)
        canvas.paste(enlarged, (x + table.frame_width + _MARGIN_PIXELS, y))
        width, below = 2 * table.frame_width + _MARGIN_PIXELS, y + frame.height + 2
        caption, font = _shown(row.caption)
        text = _fitting(caption, width, partial(draw.textlength, font=font))
        draw.text((x, below), text, fill="black", font=font)
        _draw_seen(canvas, row.seen, (x, below + _CAPTION_PIXELS), width)
    return canvas


def _draw_seen(canvas: Image.Image, seen: Sequence[Pixels], corner: tuple[int, int], width: int) -> None:
    """Earlier frames from left to right; where there is no room for all, the first one and the latest."""
    (x, y), small = corner, [Image.fromarray(pixels) for pixels in seen]
    sizes = [max(1, frame.width * _SEEN_PIXELS // frame.height) for frame in small]
    room = max(1, width // (max(sizes, default=1) + 2))
    chosen = range(len(small)) if len(small) <= room else (0, *range(len(small) - room + 1, len(small)))
    for at in chosen:
        canvas.paste(small[at].resize((sizes[at], _SEEN_PIXELS)), (x, y))
        x += sizes[at] + 2


def _shown(caption: str) -> tuple[str, ImageFont.ImageFont | ImageFont.FreeTypeFont]:
    """The caption in letters that a font of this machine has, and that font. What none has is written as `\\u524d`."""
    text = " ".join(caption.split())
    if not text.isascii():
        for name in _FONTS:
            with suppress(OSError, ImportError):
                return text.encode("utf-8", "backslashreplace").decode(), ImageFont.truetype(name, 11)
    return text.encode("ascii", "backslashreplace").decode(), ImageFont.load_default()


def _fitting(text: str, width_pixels: int, width_of: Callable[[str], float]) -> str:
    """The caption's end, which tells more of a path than its beginning."""
    if width_of(text) <= width_pixels:
        return text
    while text and width_of(f"...{text}") > width_pixels:
        text = text[1:]
    return f"...{text}"


def _check(rows: Sequence[Row]) -> None:
    if not rows:
        raise SettingsError("there is no feature to draw: give at least one")
    for pixels, feature, caption, _ in rows:
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
            found = f"{pixels.dtype} {list(pixels.shape)}"
            raise SettingsError(f"the frame of {caption} is {found}: pixels are uint8 [H, W, 3]")
        if feature.ndim != 3 or 0 in feature.shape:
            found = f"{feature.dtype} {list(feature.shape)}"
            raise SettingsError(f"the feature of {caption} is {found}: features are float32 [h, w, C]")
        if not np.isfinite(feature).all():
            raise StoreError(
                f"the feature of {caption} holds NaN or infinity, so it cannot be drawn or trained on: "
                "remove it from the cache, and check the encoder's weights and dtype"
            )
    channels = {row.feature.shape[2] for row in rows}
    if len(channels) > 1:
        raise SettingsError(
            f"the features have {', '.join(map(str, sorted(channels)))} channels, so they are of different encoders: "
            "draw them separately"
        )
    width, height = _Table(rows).size
    if width * height > MAX_PICTURE_PIXELS:
        raise SettingsError(
            f"{len(rows)} features make a picture of {width} x {height} pixels, over the limit of "
            f"{MAX_PICTURE_PIXELS}: draw fewer (--count)"
        )

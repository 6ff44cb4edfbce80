"""Trials with image files that somebody made who means harm."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

import numpy as np

from trials.children import Child, limit_memory
from trials.image_mutations import hostile_image
from vggt_cache.errors import FrameError
from vggt_cache.frames import MAX_PIXELS, decode_frame, read_frame
from vggt_cache.identity import Preprocessing
from vggt_cache.precompute.decode import decode_file

IMAGES_PER_SEED = 1000
LONGEST_S = 10.0
"""Of processor time for one file; the largest image that is allowed takes two or three seconds."""
MOST_MEMORY_BYTES = 36 * MAX_PIXELS
"""An image of the largest size is there several times while it is decoded, with 4 bytes a pixel each time."""
_SETTINGS = (
    Preprocessing(image_size=28),
    Preprocessing(image_size=28, alpha="drop"),
    Preprocessing(image_size=28, resize_mode="pad"),
)


def hostile_images(seed: int, folder: Path, *, images: int = IMAGES_PER_SEED) -> int:
    """Each file gives pixels of the right shape or is refused, in bounded time and memory."""
    with Child(partial(_decode_many, seed, images, folder), folder / "log") as child:
        child.well()
    return images


def _decode_many(seed: int, images: int, folder: Path) -> None:
    random = Random(seed)
    limit_memory(MOST_MEMORY_BYTES)
    for number in range(images):
        data, preprocessing = hostile_image(random), random.choice(_SETTINGS)
        (folder / "image").write_bytes(data)  # stands there if this process is killed by it
        started_s = time.process_time()
        with suppress(FrameError):
            _check_pixels(decode_frame(data, preprocessing), preprocessing)
        if number % 10 == 0:
            _check_file(folder / "image", data, preprocessing)
        taken_s = time.process_time() - started_s
        assert taken_s < LONGEST_S, f"{len(data)} bytes took {taken_s:.0f} s: {data[:100]!r}"


def _check_pixels(pixels: np.ndarray, preprocessing: Preprocessing) -> None:
    height, width, channels = pixels.shape
    side = preprocessing.image_size
    assert pixels.dtype == np.uint8
    assert channels == 3
    assert height % 14 == width % 14 == 0
    assert 0 < height <= side
    assert width == side
    assert height == side or preprocessing.resize_mode == "crop"


def _check_file(path: Path, data: bytes, preprocessing: Preprocessing) -> None:
    assert read_frame(path) == data
    decoded = decode_file(str(path), preprocessing)
    assert bool(decoded.error) != bool(decoded.pixels.size)

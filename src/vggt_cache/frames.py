"""From an image file to the pixels that the encoder sees, bit for bit as VGGT's own loader makes them.

The order of steps is part of the result: alpha, then RGB, then a bicubic resize on uint8 (anti-aliased,
rounded to uint8), then crop or pad. Division by 255 is left to the encoder's device; the loader's padding
value of 1.0 is 255 here. EXIF orientation is ignored and the first frame of an animation is taken, as the
reference does.

Worker processes import this module, so it needs numpy and Pillow only. Everything about a file is refused
from its header where that is possible, before pixels are decoded.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from vggt_cache.errors import FrameError
from vggt_cache.identity import GIVEN_PIXELS, PATCH_SIZE, Preprocessing
from vggt_cache.mistaken_frames import hint_for, kind_of

MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 2**20
"""Of an image, both as it is in the file and as it is after resizing (before rows are cut)."""

MAX_SCANS = 100
"""Of a JPEG. A scan of a few bytes costs time for all pixels; progressive images have about ten."""

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_ASIDES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG without a part in its pixels. Pillow refuses the whole image where one is very long."""
_GREY_16_BIT = b"\x10\0"
"""Bit depth and colour type in a PNG's header."""
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_JPEG_START, _JPEG_END, _JPEG_SCAN = 0xD8, 0xD9, 0xDA
_NO_WAITING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_frame(path: str | os.PathLike[str]) -> bytes:
    """All bytes of one image file, read once. Never waits on a pipe or a device.

    Raises FrameError, naming the path, for a file that is missing, not a regular file, over
    `MAX_FILE_BYTES`, or that the operating system refuses to read.
    """
    try:
        _check(path, os.stat(path))
        descriptor = os.open(path, _NO_WAITING)
        try:
            return _read_all(path, descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise FrameError(f"{os.fspath(path)!r} {_refusal(error, os.fspath(path))}") from error
    except ValueError as error:  # a NUL byte, or a character that no file name has
        raise FrameError(
            f"{os.fspath(path)!r} cannot be a file name ({error}): correct the annotation"
        ) from error


def _check(path: str | os.PathLike[str], status: os.stat_result) -> int:
    """The length in bytes of what can be a frame."""
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise FrameError(f"{os.fspath(path)!r} is {kind}, not an image file: correct the annotation")
    return _check_length(path, status.st_size)


def _check_length(path: str | os.PathLike[str], length: int) -> int:
    if length > MAX_FILE_BYTES:
        raise FrameError(
            f"{os.fspath(path)!r} has {length} bytes, over the limit of {MAX_FILE_BYTES} for one image: "
            "it is not a camera frame, or must be saved smaller"
        )
    return length


def _read_all(path: str | os.PathLike[str], descriptor: int) -> bytes:
    # One more than there should be: the end is seen in one call.
    want, parts, length = _check(path, os.fstat(descriptor)) + 1, list[bytes](), 0
    while part := os.read(descriptor, max(1, want - length)):
        parts.append(part)
        length = _check_length(path, length + len(part))
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _refusal(error: OSError, path: str) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"does not exist{hint_for(path)}: check the data root and the name in the annotation"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "may not be read by this user (permission denied): change its mode, or run as its owner"
    return f"cannot be read ({error.strerror or error}): check the disk or mount"


def decode_frame(data: bytes, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Pixels uint8 [H, W, 3] (RGB) of an image file's bytes; H and W are multiples of 14.

    Equal to the reference loader's output times 255. Raises FrameError with a reason that names no path.
    """
    return _decoded(lambda: _open(data), preprocessing)


def image_pixels(image: Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """The same of an image in memory, as if it had been read from a file. Pixels that are given stay as they are."""
    if preprocessing == GIVEN_PIXELS:
        return np.array(image.convert("RGB"))
    return _decoded(image.copy, preprocessing)


def _decoded(opened: Callable[[], Image.Image], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    try:
        image = opened()
        width, height = _resized(*image.size, preprocessing)
        resized = _to_rgb(image, preprocessing).resize((width, height), Image.Resampling.BICUBIC)
    except (FrameError, MemoryError):
        raise
    except Exception as error:  # what a decoder raises for damaged bytes is not a closed list
        detail = " ".join(str(error).split())[:200] or type(error).__name__
        raise FrameError(f"it is damaged or cut short ({detail}): copy or make it again") from error
    return _framed(np.asarray(resized), preprocessing)


def frame_grid(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """Patch grid (h, w) that `decode_frame` gives for an image of `width` x `height` pixels.

    Raises FrameError where `decode_frame` would refuse such a size.
    """
    new_width, new_height = _resized(width, height, preprocessing)
    side = preprocessing.image_size
    if preprocessing.resize_mode == "pad":
        return side // PATCH_SIZE, side // PATCH_SIZE
    return min(new_height, side) // PATCH_SIZE, new_width // PATCH_SIZE


def _open(data: bytes) -> ImageFile.ImageFile:
    """The image with its header read and its pixels not yet decoded.

    The plugin is called directly: `Image.open` would try every format that is installed, and warn.
    """
    file = io.BytesIO(data)
    if data.startswith(_PNG_START):
        return PngImagePlugin.PngImageFile(io.BytesIO(_without_asides(data)))
    if data.startswith(b"\xff\xd8\xff"):
        _check_scans(data)
        return JpegImagePlugin.JpegImageFile(file)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile(file)
    if data.startswith(b"BM"):
        return BmpImagePlugin.BmpImageFile(file)
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GifImagePlugin.GifImageFile(file)
    if not data:
        raise FrameError("it is empty: copy or make it again")
    if data.startswith(b"version https://git-lfs"):
        raise FrameError("it is a Git LFS pointer and not the image itself: run git lfs pull")
    raise FrameError(
        f"it is no image in a format that is read (PNG, JPEG, WebP, BMP and GIF; {kind_of(data)}): convert it, or "
        "get it again"
    )


def remark_on(data: bytes) -> str:
    """What a user should know of an image that is read as VGGT's loader reads it; mostly nothing."""
    if data.startswith(_PNG_START) and data[24:26] == _GREY_16_BIT:
        return "of an image of 16-bit grey, values over 255 are white; a depth map?"
    return ""


def _without_asides(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile, which may be longer than Pillow allows."""
    if not any(kind in data for kind in _PNG_ASIDES):
        return data
    kept, at = [data[: len(_PNG_START)]], len(_PNG_START)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in _PNG_ASIDES:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of very many scans. Bytes that look like one may stand in metadata: these are skipped."""
    if data.count(bytes([0xFF, _JPEG_SCAN])) <= MAX_SCANS:
        return
    at = scans = 0
    while scans <= MAX_SCANS:
        found = _JPEG_MARKER.search(data, at)
        if found is None or (marker := found[0][1]) == _JPEG_END:
            return
        at = found.end()
        if marker != _JPEG_START:
            at += int.from_bytes(data[at : at + 2], "big")
        scans += marker == _JPEG_SCAN
    raise FrameError(
        f"it is a JPEG of more than {MAX_SCANS} scans, which no normal program writes: save it again"
    )


def _resized(width: int, height: int, preprocessing: Preprocessing) -> tuple[int, int]:
    """(width, height) in pixels after resizing, before crop or pad.

    The float operations stand in the reference's order, and `round` is half-to-even: 4:3 images lie exactly
    on a tie, and 480 * (644 / 640) is a little more than 483.
    """
    has = f"it has {width} x {height} pixels"
    if width < 1 or height < 1:
        raise FrameError(f"{has}: make it again")
    if width * height > MAX_PIXELS:
        raise FrameError(f"{has}, over the limit of {MAX_PIXELS}: it is no frame, or must be stored smaller")
    side = preprocessing.image_size
    if preprocessing.resize_mode == "pad" and height > width:
        size = round(width * (side / height) / PATCH_SIZE) * PATCH_SIZE, side
    else:
        size = side, round(height * (side / width) / PATCH_SIZE) * PATCH_SIZE
    if 0 in size:
        raise FrameError(f"{has}, so narrow that it would have no patches at image_size {side}: cut it")
    if size[0] * size[1] > MAX_PIXELS:
        raise FrameError(
            f"{has} and would be enlarged to {size[0]} x {size[1]}, over the limit of {MAX_PIXELS}: cut it, or use "
            "--resize_mode pad"
        )
    return size


def _to_rgb(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """RGB of any mode. Only RGBA is ever blended; palettes and LA lose their alpha, as in the reference."""
    image.load()
    image.info.pop("transparency", None)  # has no part in RGB pixels; Pillow warns when it meets one
    if image.mode == "RGBA" and preprocessing.alpha == "white":
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _framed(pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """`crop`: the middle rows of an image that has too many. `pad`: white around it, equally on both sides."""
    side = preprocessing.image_size
    height, width, _ = pixels.shape
    if preprocessing.resize_mode == "crop":
        top = max(0, height - side) // 2
        return np.array(pixels[top : top + side])
    top, left = (side - height) // 2, (side - width) // 2
    square = np.full((side, side, 3), 255, np.uint8)
    square[top : top + height, left : left + width] = pixels
    return square

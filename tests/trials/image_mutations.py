"""Image files as somebody makes them who means harm: sound ones taken apart, changed in their parts, put together."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from random import Random

from trials.sound_images import exif_data, sound_files

_NO_LENGTH = {0xD8, 0xD9, 0x01, *range(0xD0, 0xD8)}
"""Markers of JPEG that stand alone."""
_LARGEST_BYTES = 1024 * 1024
"""A mutated file is not longer: what takes long then is not only its length."""
_LARGE_SHARE = 0.003
"""So many files claim to be the largest there may be: each of them takes a second."""
_NUMBERS = (
    0,
    1,
    2,
    3,
    4,
    8,
    12,
    16,
    24,
    32,
    40,
    64,
    100,
    127,
    128,
    255,
    256,
    1000,
    8000,
    8191,
    8192,
    16383,
    32767,
)
_LARGE = (65535, 65536, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


# ---------------------------------------------------------------- parts


def split(form: str, data: bytes) -> list[bytes]:
    """A sound file as its chunks or segments, the first of which is what all files begin with."""
    return _SPLIT[form](data)


def _split_png(data: bytes) -> list[bytes]:
    parts, at = [data[:8]], 8
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        parts.append(data[at:end])
        at = end
    return parts


def _split_jpeg(data: bytes) -> list[bytes]:
    """Entropy-coded data stay with the segment before them."""
    starts, at = [0], 2
    while at < len(data):
        starts.append(at)
        if data[at + 1] not in _NO_LENGTH:
            at += int.from_bytes(data[at + 2 : at + 4], "big")
        at += 2
        while at < len(data) and (data[at] != 0xFF or data[at + 1] == 0 or 0xD0 <= data[at + 1] <= 0xD7):
            at += 1
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


def _split_webp(data: bytes) -> list[bytes]:
    parts, at = [data[:12]], 12
    while at < len(data):
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        parts.append(data[at:end])
        at = end
    return parts


def _split_bmp(data: bytes) -> list[bytes]:
    offset = int.from_bytes(data[10:14], "little")
    return [data[:2], data[2:14], data[14:54], data[54:offset], data[offset:]]


def _split_gif(data: bytes) -> list[bytes]:
    """Signature, screen with its palette, then extensions and images, each with its data, and the end."""
    parts, at = [data[:6]], 6
    end = at + 7 + _palette_bytes(data[at + 4])
    while at < len(data):
        parts.append(data[at:end])
        at = end
        if data[at : at + 1] == b"!":
            end = _behind_blocks(data, at + 2)
        elif data[at : at + 1] == b",":
            end = _behind_blocks(data, at + 11 + _palette_bytes(data[at + 9]))
        else:
            end = len(data)
    return parts


def _palette_bytes(flags: int) -> int:
    return 3 << (flags % 8 + 1) if flags & 0x80 else 0


def _behind_blocks(data: bytes, at: int) -> int:
    while data[at]:
        at += 1 + data[at]
    return at + 1


_SPLIT: dict[str, Callable[[bytes], list[bytes]]] = {
    "PNG": _split_png,
    "JPEG": _split_jpeg,
    "WEBP": _split_webp,
    "BMP": _split_bmp,
    "GIF": _split_gif,
}
FORMATS = tuple(_SPLIT)


def join(form: str, parts: Sequence[bytes], *, correct: bool) -> bytes:
    """The file again; with `correct`, with lengths and checksums that fit what the parts have become."""
    if form == "PNG" and correct:
        parts = [parts[0], *(_png_chunk(part[4:8], part[8:-4]) for part in parts[1:])]
    data = b"".join(parts)
    if form == "WEBP" and correct:
        return data[:4] + (max(0, len(data) - 8) & 0xFFFFFFFF).to_bytes(4, "little") + data[8:]
    return data


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


# ---------------------------------------------------------------- changes


def hostile_image(random: Random) -> bytes:
    """A file of some format: parts changed, dropped, repeated, moved, taken from others; numbers set; bytes spoilt."""
    form = random.choice(FORMATS)
    files = sound_files()[form]
    parts = split(form, random.choice(files))
    if random.random() < _LARGE_SHARE:
        parts = random.choice((_repeat, _all_over_again))(form, _enlarge(form, parts, random), random)
    for _ in range(random.choice((1, 1, 1, 2, 3, 5))):
        change = random.choice((_number, _number, _bytes, _drop, _repeat, _move, _foreign, _insert))
        parts = change(form, parts, random)
    data = join(form, parts, correct=random.random() < 0.7)
    for _ in range(random.choice((0, 0, 0, 0, 1, 2))):
        data = random.choice((_cut, _spoil, _splice))(data, random)
    return data[:_LARGEST_BYTES]


def _enlarge(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    """Width and height, where the format has them, are those of the largest images."""
    width, height = random.choice(((8192, 8192), (8192, 8192), (8000, 8191), (65535, 1024), (9000, 9000)))
    sizes = {
        "PNG": (1, 8, struct.pack(">II", width, height)),
        "BMP": (2, 4, struct.pack("<ii", width, height)),
        "GIF": (1, 0, struct.pack("<HH", width, height)),
        "WEBP": (1, 12, (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")),
        "JPEG": (_frame_header(parts), 5, struct.pack(">HH", height, width)),
    }
    at, start, size = sizes[form]
    changed = parts[at][:start] + size + parts[at][start + len(size) :]
    return [*parts[:at], changed, *parts[at + 1 :]]


def _frame_header(parts: Sequence[bytes]) -> int:
    """Of a JPEG."""
    return next((at for at, part in enumerate(parts) if part[1:2] in (b"\xc0", b"\xc2")), 0)


def _some(parts: Sequence[bytes], random: Random) -> int:
    return random.randrange(min(1, len(parts) - 1), len(parts))


def _number(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    """A number anywhere in the beginning of a part (sizes, counts, lengths, kinds) becomes another."""
    at = random.choice((_some(parts, random), min(2 if form == "BMP" else 1, len(parts) - 1)))
    part = parts[at]
    width = random.choice((1, 2, 2, 3, 4, 4))
    start = random.randrange(max(1, min(len(part), 40)))
    value = random.choice(_NUMBERS if random.random() < 0.9 else _LARGE) % 256**width
    order = "big" if form in ("PNG", "JPEG") else "little"
    changed = part[:start] + value.to_bytes(width, order) + part[start + width :]  # type: ignore[arg-type]
    return [*parts[:at], changed, *parts[at + 1 :]]


def _bytes(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    at = _some(parts, random)
    return [*parts[:at], _spoil(parts[at], random), *parts[at + 1 :]]


def _drop(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    at = _some(parts, random)
    return [*parts[:at], *parts[at + 1 :]] if len(parts) > 1 else parts


def _repeat(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    at = _some(parts, random)
    most = max(1, _LARGEST_BYTES // max(1, len(parts[at])))
    return [*parts[:at], *[parts[at]] * min(random.choice((2, 2, 3, 50, 2000)), most), *parts[at + 1 :]]


def _all_over_again(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    """The second half of it, such as all scans of a JPEG, for as often as there is room."""
    half = len(parts) // 2
    times = _LARGEST_BYTES // max(1, sum(map(len, parts[half:-1])))
    return [*parts[:half], *parts[half:-1] * times, parts[-1]]


def _move(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    moved = list(parts)
    part = moved.pop(_some(moved, random))
    moved.insert(random.randint(min(1, len(moved)), len(moved)), part)
    return moved


def _foreign(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    """A part of another file, in the place of one or before it."""
    other = split(form, random.choice(sound_files()[form]))
    at = _some(parts, random)
    return [*parts[:at], other[_some(other, random)], *parts[at + random.randrange(2) :]]


def _insert(form: str, parts: list[bytes], random: Random) -> list[bytes]:
    """A part that unfolds into much more than it is, or that no file has."""
    at = random.randrange(1, len(parts) + 1)
    return [*parts[:at], random.choice(_bombs()[form]), *parts[at:]]


@lru_cache(maxsize=1)
def _bombs() -> dict[str, list[bytes]]:
    zeros = zlib.compress(bytes(50_000_000), 9)
    png = [
        _png_chunk(b"iCCP", b"name\0\0" + zeros),
        _png_chunk(b"zTXt", b"name\0\0" + zeros),
        _png_chunk(b"iTXt", b"name\0\1\0\0\0" + zeros),
        _png_chunk(b"IDAT", zeros),
        _png_chunk(b"fdAT", bytes(4) + zeros),
        _png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)),
        _png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 2**16, 2**16, 0, 0, 1, 1, 0, 0)),
        _png_chunk(b"eXIf", exif_data() * 100),
    ]
    jpeg = [
        b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(content)) + content
        for marker in (0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDD, 0xCC)
        for content in (
            b"",
            exif_data() * 5,
            b"ICC_PROFILE\0\1\xff" + bytes(60_000),
            b"Photoshop 3.0\x008BIM\4\4" * 900,
        )
    ]
    webp = [
        kind + struct.pack("<I", len(content)) + content
        for kind in (b"ICCP", b"EXIF", b"XMP ", b"ALPH", b"ANIM", b"ANMF", b"VP8X", b"VP8L")
        for content in (b"", bytes(24), b"\xff" * 24, bytes(100_000))
    ]
    bmp = [b"\0\0" * 50_000, b"\xff\0" * 50_000, b"\0\2\xff\xff" * 20_000, b"\xff" * 50_000]
    image = b",\0\0\0\0" + struct.pack("<HHB", 2**16 - 1, 2**16 - 1, 0) + b"\x08"
    gif = [
        b"!\xfe" + b"\xff" * 60_000 + b"\0",
        b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0",
        image + b"\0",
        b"!\xf9\4\xff\0\0\xff\0",
    ]
    gif += [image + (b"\xff" + b"\x5a" * 255) * 1000 + b"\0"]
    return {"PNG": png, "JPEG": jpeg, "WEBP": webp, "BMP": bmp, "GIF": gif}


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _spoil(data: bytes, random: Random) -> bytes:
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8)) if data else 0):
        spoilt[random.randrange(len(spoilt))] = random.choice((0, 255, random.randrange(256)))
    return bytes(spoilt)


def _splice(data: bytes, random: Random) -> bytes:
    """The beginning of it and the end of another file."""
    other = random.choice(sound_files()[random.choice(FORMATS)])
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other)) :]

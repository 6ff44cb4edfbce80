"""Sound image files of many kinds, which trials then change."""

from __future__ import annotations

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, PngImagePlugin


def _encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _picture(mode: str, seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


@lru_cache(maxsize=1)
def sound_files() -> dict[str, list[bytes]]:
    """By format: files of many kinds, all of which can be read."""
    modes = {"PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK")}
    files = {form: [_of_mode(form, mode, n) for n, mode in enumerate(modes[form])] for form in modes}
    three = [_picture("RGB", seed) for seed in range(3)]
    more: dict[str, object] = {"save_all": True, "append_images": three[1:]}
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 500, zip=True)
    text.add_itxt("title", "é" * 200, zip=True)
    profile, exif = _profile(), exif_data()
    files["PNG"] += [
        _encoded(three[0], "PNG", **more),
        _encoded(three[0], "PNG", pnginfo=text, icc_profile=profile, exif=exif, dpi=(72, 72)),
        _encoded(three[0].quantize(8), "PNG", transparency=b"\0\x80\xff"),
    ]
    files["JPEG"] += [
        _encoded(three[0], "JPEG", progressive=True, icc_profile=profile, exif=exif),
        _encoded(three[0], "JPEG", subsampling=0, restart_marker_blocks=1, comment=b"x"),
    ]
    files["WEBP"] = [
        _encoded(three[0], "WEBP"),
        _encoded(_picture("RGBA", 4), "WEBP", lossless=True),
        _encoded(_picture("RGBA", 5), "WEBP", icc_profile=profile, exif=exif),
        _encoded(three[0], "WEBP", **more),
    ]
    files["BMP"] = [_encoded(_picture(mode, 6), "BMP") for mode in ("RGB", "RGBA", "L", "P", "1")]
    files["BMP"] += [_run_lengths(8), _run_lengths(4)]
    files["GIF"] = [
        _encoded(_picture("P", 7), "GIF"),
        _encoded(_picture("L", 7), "GIF", interlace=0, comment=b"x"),
        _encoded(_picture("P", 8), "GIF", transparency=3),
        _encoded(three[0], "GIF", **more),
    ]
    return files


def _of_mode(form: str, mode: str, seed: int) -> bytes:
    if mode == "I;16":
        deep = np.random.default_rng(seed).integers(0, 2**16, (20, 24), dtype=np.uint16)
        return _encoded(Image.fromarray(deep), form)
    return _encoded(_picture(mode, seed), form)


def _profile() -> bytes:
    return struct.pack(">I", 400) + bytes(8) + b"mntrRGB XYZ " + bytes(376)


def exif_data() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x011A] = 6, "maker", 72.0
    return exif.tobytes()


def _run_lengths(bits: int) -> bytes:
    """A BMP of 24 x 20 pixels in runs, with every escape that there is."""
    row, four = b"\x18\x11\0\0", b"\0\4\x12\x21" + b"\3\4" * (bits == 8)
    rows = row * 8 + four + b"\x14\x22\0\0" + b"\0\2\2\1" + b"\x16\x22\0\0" + row * 9 + b"\0\1"
    palette = bytes(range(256)) * 4 if bits == 8 else bytes(range(64))
    offset = 54 + len(palette)
    head = struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
    info = struct.pack("<IiiHHIIiiII", 40, 24, 20, 1, bits, 1 if bits == 8 else 2, len(rows), 0, 0, 0, 0)
    return head + info + palette + rows

"""What may have gone wrong where a frame's file is not there, or is there and no image that is read."""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from itertools import islice

_MOST_NAMES = 10_000
_KINDS = (
    (rb"\s*<(!doctype html|html|head|body)", "an HTML page, as servers send in place of a file"),
    (rb"\s*(<\?xml|<svg)", "XML or SVG"),
    (rb"II[*+]\0|MM\0[*+]", "TIFF"),
    (rb"....ftypavi[fs]", "AVIF"),
    (rb"....ftyp(hei|hev|mif|msf)", "HEIC"),
    (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG 2000"),
    (rb"\0\0\0\x0cJXL |\xff\x0a", "JPEG XL"),
    (rb"P[1-7fF]\s", "PPM (or PGM, PBM, PFM)"),
    (rb"\x76\x2f\x31\x01", "OpenEXR"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"%PDF", "PDF"),
    (rb"\x1f\x8b|PK\x03\x04", "a packed file"),
)
"""How files begin that are met in the place of images."""
_BEGINNINGS = [(re.compile(beginning, re.IGNORECASE | re.DOTALL), kind) for beginning, kind in _KINDS]


def kind_of(data: bytes) -> str:
    """What a file is that is no frame, by its beginning; the beginning itself where that is not known."""
    kinds = (kind for beginning, kind in _BEGINNINGS if beginning.match(data))
    return f"it is {kind}" if (kind := next(kinds, "")) else f"it begins with {data[:8].hex(' ')}"


def hint_for(path: str) -> str:
    """What in the name of a file may be the reason that there is none, such as ` (it has backslashes)`; or nothing."""
    folder, name = os.path.split(path)
    if "file:/" in path:
        return " (a name is a path, not a file:// address)"
    if re.search(r"(^|/)https?:/", path):
        return " (a name is a path, not an address)"
    if os.path.islink(path):
        return " (it is a link that leads nowhere)"
    if "\\" in path:
        return " (it has backslashes; folders are parted by /)"
    if name != name.strip():
        return " (its name begins or ends with a blank)"
    while folder and not os.path.isdir(folder):  # the first name on the way that is not there
        folder, name = os.path.split(folder)
    if (there := _names_in(folder).get(_alike(name), name)) != name:
        what = "capitals" if there.lower() == name.lower() else "another Unicode form"
        return f" (but {there!r} does: {what})"
    return ""


def _alike(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@lru_cache(maxsize=4)
def _names_in(folder: str) -> dict[str, str]:
    """Names in a folder by what they are but for capitals and Unicode form; of a very large folder the first."""
    try:
        with os.scandir(folder) as entries:
            return {_alike(entry.name): entry.name for entry in islice(entries, _MOST_NAMES)}
    except (OSError, ValueError):
        return {}

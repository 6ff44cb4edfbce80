"""A small JPEG file cannot take hours: each of its scans costs time for all pixels, so there may not be many."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, JpegImagePlugin

from trials.image_mutations import split
from vggt_cache.errors import FrameError
from vggt_cache.frames import MAX_SCANS, decode_frame
from vggt_cache.identity import Preprocessing

SMALL = Preprocessing(image_size=28)


def progressive(**options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", progressive=True, **options)
    return buffer.getvalue()


def is_scan(part: bytes) -> bool:
    return part.startswith(b"\xff\xda")


def with_scans(count: int) -> bytes:
    """The same image, its last scan repeated: later ones change nothing."""
    *parts, end = split("JPEG", progressive())
    return b"".join([*parts, *[parts[-1]] * (count - sum(map(is_scan, parts))), end])


def test_a_jpeg_with_very_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decode_frame(with_scans(MAX_SCANS), SMALL)
    monkeypatch.setattr(JpegImagePlugin, "JpegImageFile", lambda file: pytest.fail("was decoded"))
    with pytest.raises(FrameError, match="more than 100 scans"):
        decode_frame(with_scans(MAX_SCANS + 1), SMALL)


def test_bytes_that_look_like_scans_in_metadata_and_behind_the_end_do_not_count() -> None:
    noisy = progressive(comment=b"\xff\xda\0\2" * 1000) + b"\xff\xda\0\2" * 1000
    assert np.array_equal(decode_frame(noisy, SMALL), decode_frame(progressive(), SMALL))


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xff\xda", b"\xff\xe1\xff"])
def test_a_file_of_scans_without_an_end_is_refused_too(tail: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(with_scans(MAX_SCANS + 1)[:-2] + tail, SMALL)

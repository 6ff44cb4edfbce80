"""Pixels are the reference's, bit for bit; no file can do worse than be refused in one sentence."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from vggt_cache import frames
from vggt_cache.errors import FrameError
from vggt_cache.frames import MAX_FILE_BYTES, MAX_PIXELS, decode_frame, frame_grid, read_frame, remark_on
from vggt_cache.identity import Preprocessing

ASSETS = Path(__file__).parent / "assets" / "preprocess"
SMALL = Preprocessing(image_size=28)
FORMATS = {
    "PNG": {},
    "JPEG": {"quality": 90},
    "WEBP": {"lossless": True},
    "BMP": {},
    "GIF": {},
}


def _golden_cases() -> list[str]:
    with np.load(ASSETS / "preprocess.npz") as golden:
        return [name.removesuffix("/sha256") for name in golden.files if name.endswith("/sha256")]


def _picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def _or_refusal(work: Callable[[], Any]) -> Any:
    """What `work` returns, or the one sentence with which it refuses."""
    try:
        return work()
    except FrameError as refusal:
        sentence = str(refusal)
    assert "\n" not in sentence
    return sentence


def _png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# ---------------------------------------------------------------- the reference's pixels


@pytest.mark.parametrize("case", _golden_cases())
def test_pixels_equal_the_reference_loader_bit_for_bit(case):
    name, size, mode = case.split("/")
    alpha = "drop" if name.endswith("_convertRGB_first") else "white"
    data = read_frame(ASSETS / f"{name.removesuffix('_convertRGB_first')}.png")
    pixels = decode_frame(data, Preprocessing(image_size=int(size), resize_mode=mode, alpha=alpha))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    as_loaded = np.ascontiguousarray(pixels.astype(np.float32).transpose(2, 0, 1)) / np.float32(255)
    with np.load(ASSETS / "preprocess.npz") as golden:
        assert as_loaded.shape == tuple(golden[f"{case}/shape"])
        assert hashlib.sha256(as_loaded.tobytes()).hexdigest() == str(golden[f"{case}/sha256"])


def test_every_kind_of_golden_case_is_there():
    names = {tuple(case.split("/")[1:]) for case in _golden_cases()}
    assert len(_golden_cases()) == 29
    assert names == {("518", "crop"), ("518", "pad"), ("644", "crop"), ("644", "pad")}


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (640, 480, (35, 46)),  # 480 * (644 / 640) is a little more than 483, the tie of 34.5 patches
        (800, 600, (35, 46)),
        (64, 48, (34, 46)),  # here the product is exactly 483, and half goes to even
        (1024, 768, (34, 46)),
        (480, 640, (46, 46)),
        (1, 60, (46, 46)),
    ],
)
def test_ties_round_as_in_the_reference(width, height, grid):
    assert frame_grid(width, height, Preprocessing(image_size=644)) == grid


preprocessings = st.builds(
    Preprocessing,
    image_size=st.sampled_from([14, 28, 70]),
    resize_mode=st.sampled_from(["crop", "pad"]),
)


@given(st.integers(1, 300), st.integers(1, 300), preprocessings)
@example(1, 300, Preprocessing(image_size=14))
@example(300, 1, Preprocessing(image_size=14))
@example(1, 300, Preprocessing(image_size=14, resize_mode="pad"))
def test_grid_of_a_size_is_that_of_the_decoded_pixels_or_both_refuse(width, height, preprocessing):
    data = _encoded(Image.new("L", (width, height), 7))
    grid = _or_refusal(lambda: frame_grid(width, height, preprocessing))
    pixels = _or_refusal(lambda: decode_frame(data, preprocessing))
    if isinstance(grid, str):
        assert pixels == grid
    else:
        assert pixels.shape == (grid[0] * 14, grid[1] * 14, 3)


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.sampled_from([14, 518, 644]))
def test_grid_is_the_nearest_to_the_true_height(width, height, size):
    grid = _or_refusal(lambda: frame_grid(width, height, Preprocessing(image_size=size)))
    assume(not isinstance(grid, str))
    rows, columns = grid
    assert columns * 14 == size
    assert abs(rows * 14 - min(height * size / width, size)) <= 7 + 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "I;16", "RGB", "RGBA"])
def test_every_mode_of_png_becomes_what_pillow_makes_of_it(mode):
    image = _picture(28, 28).convert("L" if mode == "I;16" else mode)
    data = _encoded(image.convert("I;16") if mode == "I;16" else image)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decode_frame(data, SMALL), np.asarray(expected))


def test_cmyk_jpeg_becomes_what_pillow_makes_of_it():
    data = _encoded(_picture(28, 28).convert("CMYK"), "JPEG")
    assert np.array_equal(decode_frame(data, SMALL), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(256))])
def test_transparent_palette_loses_its_alpha_without_a_warning(transparency):
    data = _encoded(_picture(28, 28).quantize(256), transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pixels = decode_frame(data, SMALL)
    assert np.array_equal(pixels, expected)
    assert not told


def test_hidden_colours_show_only_where_alpha_is_dropped():
    hidden = Image.new("RGBA", (28, 28), (200, 10, 10, 0))
    data = _encoded(hidden)
    assert (decode_frame(data, SMALL) == 255).all()
    assert (decode_frame(data, Preprocessing(image_size=28, alpha="drop")) == (200, 10, 10)).all()


def test_exif_orientation_is_ignored_as_in_the_reference():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = _picture(56, 28)
    turned, plain = _encoded(image, "JPEG", exif=exif), _encoded(image, "JPEG")
    assert turned != plain
    assert np.array_equal(decode_frame(turned, SMALL), decode_frame(plain, SMALL))


@pytest.mark.parametrize("format_", ["PNG", "WEBP"])
def test_first_frame_of_an_animation_is_taken(format_):
    first, second = _picture(28, 28, seed=1), _picture(28, 28, seed=2)
    options = {"lossless": True} if format_ == "WEBP" else {}
    moving = _encoded(first, format_, save_all=True, append_images=[second], duration=100, **options)
    assert np.array_equal(decode_frame(moving, SMALL), np.asarray(first))


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
def test_the_first_frame_of_a_gif_is_what_pillow_makes_of_it(moving, transparent):
    first, second = (_picture(28, 28, seed).quantize(64) for seed in (1, 2))
    options = {"transparency": 3} if transparent else {}
    data = _encoded(first, "GIF", save_all=moving, append_images=[second] * moving, **options)
    assert np.array_equal(decode_frame(data, SMALL), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def _with_chunk(data: bytes, kind: bytes, content: bytes, *, at_end: bool) -> bytes:
    body = kind + content
    chunk = struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
    at = len(data) - 12 if at_end else 33  # before IEND, or behind IHDR
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize(
    ("kind", "before"),
    [(b"tEXt", None), (b"zTXt", b"key\0\0"), (b"iTXt", b"key\0\1\0\0\0"), (b"iCCP", b"icc\0\0")],
)
def test_texts_and_profiles_over_pillows_limit_do_not_cost_the_image(kind, before, at_end):
    plain = _encoded(_picture(28, 28))
    long = b"x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1)
    content = b"key\0" + long if before is None else before + zlib.compress(long)
    data = _with_chunk(plain, kind, content, at_end=at_end)
    assert np.array_equal(decode_frame(data, SMALL), decode_frame(plain, SMALL))


def test_16_bit_grey_is_remarked_on_and_nothing_else():
    grey = _picture(28, 28).convert("L")
    assert remark_on(_encoded(grey.convert("I;16"))) == (
        "of an image of 16-bit grey, values over 255 are white; a depth map?"
    )
    assert not any(map(remark_on, [_encoded(grey), _encoded(_picture(9, 9)), _encoded(grey, "JPEG"), b""]))


@pytest.mark.parametrize("format_", FORMATS)
def test_formats_that_are_named_are_read(format_):
    image = _picture(28, 28).resize((280, 280), Image.Resampling.BICUBIC).quantize(256).convert("RGB")
    data = _encoded(image, format_, **FORMATS[format_])
    difference = decode_frame(data, SMALL).astype(int) - decode_frame(_encoded(image), SMALL)
    assert np.abs(difference).mean() < 2


# ---------------------------------------------------------------- refusals of content


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "it is empty: copy or make it again"),
        (b"hello, this is text", "it is no image in a format that is read (PNG, JPEG, WebP, BMP and GIF"),
        (b"hello, this is text", "begins with 68 65 6c 6c 6f"),
        (
            _encoded(_picture(9, 9), "TIFF"),
            "it is no image in a format that is read (PNG, JPEG, WebP, BMP and GIF; it is TIFF): convert",
        ),
        (_encoded(_picture(9, 9), "AVIF"), "; it is AVIF): convert"),
        (_encoded(_picture(9, 9), "JPEG2000"), "; it is JPEG 2000): convert"),
        (_encoded(_picture(9, 9), "PPM"), "; it is PPM (or PGM, PBM, PFM)): convert"),
        (
            b"<!DOCTYPE html><html>404",
            "it is an HTML page, as servers send in place of a file): convert it, or get it again",
        ),
        (b"\n <html>", "it is an HTML page"),
        (b"<svg>", "it is XML or SVG"),
        (b"\x1f\x8b\x08\0", "it is a packed file"),
        (b"GIF89a", "it is damaged or cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n", "it is damaged or cut short"),
        (b"\xff\xd8\xff", "it is damaged or cut short"),
        (b"RIFF\0\0\0\0WEBP", "it is damaged or cut short"),
        (b"BM", "it is damaged or cut short"),
    ],
)
def test_what_is_no_image_is_refused_in_one_sentence(data, sentence):
    with pytest.raises(FrameError) as refusal:
        decode_frame(data, SMALL)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_whatever_a_decoder_says_becomes_one_short_sentence(monkeypatch):
    def fail(image: object) -> None:
        raise RuntimeError("bad\n" * 1000)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    with pytest.raises(FrameError) as refusal:
        decode_frame(_encoded(_picture(9, 9)), SMALL)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.promise("hostile input")
@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((100_000, 100_000), f"it has 100000 x 100000 pixels, over the limit of {MAX_PIXELS}"),
        ((8192, 8193), f"it has 8192 x 8193 pixels, over the limit of {MAX_PIXELS}"),
        ((1, 100_000), "it has 1 x 100000 pixels and would be enlarged to 518 x 51800000"),
        ((100_000, 1), "it has 100000 x 1 pixels, so narrow that it would have no patches at image_size 518"),
    ],
)
def test_bombs_are_refused_from_the_header_without_decoding_or_warning(monkeypatch, size, sentence):
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda image: pytest.fail("was decoded"))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(FrameError) as refusal:
            decode_frame(_png_header(*size), Preprocessing())
    assert str(refusal.value).startswith(sentence)
    assert not told


def test_largest_image_that_is_allowed_is_not_refused_for_its_size():
    assert frame_grid(8192, 8192, Preprocessing()) == (37, 37)


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (-1, 5)])
def test_sizes_that_no_image_has_are_refused(size):
    with pytest.raises(FrameError, match="pixels: make it again"):
        frame_grid(*size, SMALL)


@given(st.sampled_from(sorted(FORMATS)), st.floats(0, 1, exclude_max=True))
def test_a_file_cut_short_is_refused_or_was_complete(format_, share):
    data = _encoded(_picture(40, 30), format_, **FORMATS[format_])
    pixels = _or_refusal(lambda: decode_frame(data[: int(len(data) * share)], SMALL))
    assert isinstance(pixels, str) or np.array_equal(pixels, decode_frame(data, SMALL))


@given(
    st.sampled_from(sorted(FORMATS)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_damaged_bytes_give_pixels_or_a_refusal_and_nothing_else(format_, changes):
    data = bytearray(_encoded(_picture(20, 15), format_, **FORMATS[format_]))
    for at, value in changes:
        data[at % len(data)] = value
    pixels = _or_refusal(lambda: decode_frame(bytes(data), SMALL))
    assert isinstance(pixels, str) or pixels.shape[1] == 28


# ---------------------------------------------------------------- files


def test_reading_gives_all_bytes_whatever_portions_the_system_returns(tmp_path, monkeypatch):
    path = tmp_path / "frame.png"
    path.write_bytes(os.urandom(10_000))
    assert read_frame(path) == path.read_bytes()
    whole = os.read
    monkeypatch.setattr(frames.os, "read", lambda descriptor, count: whole(descriptor, min(count, 999)))
    assert read_frame(str(path)) == path.read_bytes()


def test_links_to_files_are_read(tmp_path):
    (tmp_path / "real.png").write_bytes(b"12345")
    (tmp_path / "link.png").symlink_to("real.png")
    assert read_frame(tmp_path / "link.png") == b"12345"


def _absent(folder: Path) -> Path:
    return folder / "absent.png"


def _below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "frame.png"


def _folder(folder: Path) -> Path:
    (folder / "folder.png").mkdir()
    return folder / "folder.png"


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def _huge(folder: Path) -> Path:
    with open(folder / "huge.png", "wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    return folder / "huge.png"


def _long_name(folder: Path) -> Path:
    return folder / ("x" * 300)


def _circle(folder: Path) -> Path:
    (folder / "circle.png").symlink_to("circle.png")
    return folder / "circle.png"


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_absent, "does not exist: check the data root and the name in the annotation"),
        (_below_a_file, "does not exist: check the data root and the name in the annotation"),
        (_folder, "is a directory, not an image file"),
        (_pipe, "is a pipe, socket or device, not an image file"),
        (_huge, f"has {MAX_FILE_BYTES + 1} bytes, over the limit of {MAX_FILE_BYTES} for one image"),
        (_long_name, "cannot be read (File name too long)"),
        (_circle, "cannot be read (Too many levels of symbolic links)"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_sentence(tmp_path, make, sentence):
    path = make(tmp_path)
    with pytest.raises(FrameError) as refusal:
        read_frame(path)
    assert str(refusal.value).startswith(f"{str(path)!r} {sentence}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_names_that_no_file_can_have_are_refused(name):
    with pytest.raises(FrameError, match="cannot be a file name"):
        read_frame(name)


@pytest.mark.parametrize("make", [_folder, _pipe, _huge])
def test_what_is_no_frame_is_neither_opened_nor_read(tmp_path, monkeypatch, make):
    """Opening a device can have effects; reading a huge file takes the memory that the limit is to save."""
    path = make(tmp_path)
    monkeypatch.setattr(frames.os, "open", lambda *arguments: pytest.fail("was opened"))
    with pytest.raises(FrameError):
        read_frame(path)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sub\\frame.png", "it has backslashes; folders are parted by /"),
        ("file:///data/frame.png", "a name is a path, not a file:// address"),
        ("https://host/frame.png", "a name is a path, not an address"),
        ("frame.png ", "its name begins or ends with a blank"),
        ("Frame.PNG", "but 'frame.png' does: capitals"),
        ("caf\u0065\u0301.png", "but 'caf\u00e9.png' does: another Unicode form"),
        ("link.png", "it is a link that leads nowhere"),
        ("episode/frame.png", "but 'Episode' does: capitals"),
    ],
)
def test_a_missing_file_comes_with_what_may_be_wrong_with_its_name(tmp_path, name, hint):
    (tmp_path / "frame.png").touch()
    (tmp_path / "Episode").mkdir()
    (tmp_path / "caf\u00e9.png").touch()
    (tmp_path / "link.png").symlink_to("nowhere.png")
    path = f"{tmp_path}/{name}"
    with pytest.raises(FrameError) as refusal:
        read_frame(path)
    assert str(refusal.value).startswith(f"{path!r} does not exist ({hint}): check")


def test_permission_is_told_apart_from_absence(tmp_path, monkeypatch):
    path = tmp_path / "frame.png"
    path.touch()

    def refuse(*arguments: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(frames.os, "open", refuse)  # root, as which tests may run, is refused nothing
    with pytest.raises(FrameError, match=r"frame.png' may not be read by this user"):
        read_frame(path)


def test_a_file_that_turns_into_a_pipe_after_the_first_look_does_not_block(tmp_path, monkeypatch):
    path, regular = _pipe(tmp_path), os.stat(__file__)
    monkeypatch.setattr(frames.os, "stat", lambda name: regular)
    with pytest.raises(FrameError, match="is a pipe"):
        read_frame(path)


def test_a_file_that_grows_over_the_limit_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "frame.png"
    path.write_bytes(b"x" * 100)
    monkeypatch.setattr(frames, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(frames.os, "read", lambda descriptor, count: b"x" * 300)
    with pytest.raises(FrameError, match="over the limit of 1000"):
        read_frame(path)


def test_decode_workers_need_no_torch():
    code = "import sys, vggt_cache.frames; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""The lossless codec by itself: every bit comes back, and bytes that it did not write are refused."""

from __future__ import annotations

import random
import struct
import sys
import threading
import tracemalloc
from functools import lru_cache

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from vggt_cache.codec import CODECS, codec_for, coded_form, lossless, shard_codec
from vggt_cache.codec.lossless import PIECE_VALUES, Lossless, join, split
from vggt_cache.errors import SettingsError

CODEC = Lossless()


def values_of(kind: str, count: int) -> np.ndarray:
    """bfloat16 values as words of 16 bits."""
    generator = np.random.default_rng(count)
    if kind == "any bits":
        return generator.integers(0, 1 << 16, count, dtype=np.uint16)
    if kind == "equal":
        return np.full(count, 0x3F80, np.uint16)
    return (
        torch.randn(count, generator=torch.Generator().manual_seed(count))
        .bfloat16()
        .view(torch.uint16)
        .numpy()
    )


def packed(values: np.ndarray, channels: int = 2) -> bytes:
    return bytes(CODEC.encode(memoryview(values.tobytes()), len(values) // channels, channels))


def unpacked(stored: bytes, count: int, channels: int = 2) -> np.ndarray:
    values = np.zeros(count, np.uint16)
    CODEC.decode(memoryview(stored), values.view(np.uint8).data, count // channels, channels)
    return values


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("kind", ["any bits", "equal", "activations"])
@pytest.mark.parametrize(
    "count", [2, 4, 1000, PIECE_VALUES - 2, PIECE_VALUES, PIECE_VALUES + 2, 2 * PIECE_VALUES + 70]
)
def test_every_value_comes_back_bit_for_bit(kind: str, count: int) -> None:
    values = values_of(kind, count)
    stored = packed(values)
    least, most = CODEC.size_limits(count // 2, 2)
    assert least <= len(stored) <= most
    assert (unpacked(stored, count) == values).all()


def test_every_bfloat16_there_is_comes_back_at_every_place_of_a_pair() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for values in (np.concatenate([every, every[::-1]]), np.repeat(every, 2)):
        assert (unpacked(packed(values), len(values)) == values).all()


@given(st.lists(st.integers(0, 65535), min_size=1, max_size=50))
@settings(max_examples=100)
def test_the_planes_hold_exponents_and_the_rest(half: list[int]) -> None:
    values = np.array([*half, *half[::-1]], np.uint16)
    exponents, rest, back, scratch = (
        np.empty(size, np.uint16) for size in (len(half), len(half), 2 * len(half), len(half))
    )
    split(values, exponents, rest)
    in_pairs = np.stack([values[: len(half)], values[len(half) :]], axis=1).reshape(-1)
    assert (exponents.view(np.uint8) == (in_pairs >> 7 & 0xFF)).all()
    join(exponents, rest, back, scratch)
    assert (back == values).all()


def test_memory_of_any_alignment_will_do() -> None:
    values = values_of("activations", 4000)
    stored = packed(values)
    behind = bytearray(1 + len(stored))
    behind[1:] = stored
    target = np.zeros(8001, np.uint8)
    CODEC.decode(memoryview(behind)[1:], target.data[1:], 2000, 2)
    assert target[1:].tobytes() == values.tobytes()


def test_activations_shrink_to_little_more_than_the_entropy_of_their_exponents() -> None:
    values = values_of("activations", 1 << 20)
    counts = np.bincount(values >> 7 & 0xFF)
    shares = counts[counts > 0] / len(values)
    bound_bytes = len(values) * (8 - (shares * np.log2(shares)).sum()) / 8
    assert bound_bytes <= len(packed(values)) <= 1.03 * bound_bytes


def test_threads_do_not_disturb_each_other() -> None:
    jobs = {
        seed: values_of("any bits" if seed % 2 else "activations", 200_000 + 2 * seed) for seed in range(4)
    }
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(5):
            values = jobs[seed]
            if (unpacked(packed(values), len(values)) != values).any():
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---------------------------------------------------------------- bytes that it did not write


COUNT = PIECE_VALUES + 1000


def parts() -> tuple[bytes, list[bytes]]:
    """The plane and the frames of a record of two pieces."""
    stored = packed(values_of("activations", COUNT))
    lengths = struct.unpack_from("<2I", stored, COUNT)
    at = COUNT + 8
    return stored[:COUNT], [stored[at : at + lengths[0]], stored[at + lengths[0] :]]


def assembled(plane: bytes, frames: list[bytes], lengths: list[int] | None = None) -> bytes:
    return plane + struct.pack("<2I", *(lengths or map(len, frames))) + b"".join(frames)


def refused(stored: bytes) -> bool:
    try:
        unpacked(stored, COUNT)
    except ValueError:
        return True
    return False


def frame_of(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


@lru_cache
def bad_records() -> dict[str, bytes]:
    plane, (first, second) = parts()
    bomb, sized = frame_of(bytes(1 << 28)), frame_of(bytes(PIECE_VALUES))
    without_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(PIECE_VALUES))
    return {
        "a bomb": assembled(plane, [bomb, second]),
        "a frame that does not tell its size": assembled(plane, [without_size, second]),
        "frames swapped": assembled(plane, [second, first]),
        "a frame that is too short": assembled(plane, [frame_of(bytes(PIECE_VALUES - 2)), second]),
        "a frame of another format": assembled(plane, [b"\x1f\x8b" + sized[2:], second]),
        "a frame cut short, and the table with it": assembled(plane, [first[:-1], second]),
        "two frames in the place of one": assembled(plane, [sized + frame_of(b"more"), second]),
        "bytes behind a frame": assembled(plane, [sized + b"more", second]),
        "a table that tells too much": assembled(plane, [first, second], [len(first), len(second) + 1]),
        "a table that tells too little": assembled(plane, [first, second], [len(first), len(second) - 1]),
        "a table of huge numbers": assembled(plane, [first, second], [2**32 - 1, 2**32 - 1]),
        "no frames": plane,
        "less than the plane": plane[:-1],
        "nothing": b"",
        "half a table": plane + b"\0\0\0\0",
    }


@pytest.mark.parametrize("what", bad_records())
def test_what_the_codec_did_not_write_is_refused(what: str) -> None:
    assert refused(bad_records()[what])


def test_the_record_that_the_bad_ones_are_made_of_is_a_good_one() -> None:
    assert not refused(assembled(*parts()))


def test_a_bomb_is_refused_before_memory_is_taken() -> None:
    record = bad_records()["a bomb"]
    unpacked(assembled(*parts()), COUNT)
    tracemalloc.start()
    assert refused(record)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * COUNT


def test_any_flipped_bit_gives_a_feature_or_a_refusal_and_nothing_else() -> None:
    """The checksum finds it first; but should somebody have made a new one, the process must not come to harm."""
    stored, chooser = assembled(*parts()), random.Random(5)
    for position in [*range(COUNT, COUNT + 60), *chooser.sample(range(COUNT, len(stored)), 200)]:
        damaged = bytearray(stored)
        damaged[position] ^= 1 << chooser.randrange(8)
        refused(bytes(damaged))


# ---------------------------------------------------------------- which codec


def test_which_codec_a_shard_gets() -> None:
    assert shard_codec("bfloat16") == shard_codec("float32", "none") == "none"
    assert shard_codec("bfloat16", "lossless") == "lossless"
    assert shard_codec("int8") == shard_codec("int8", "int8") == "int8"
    assert [codec_for(name).name for name in (*CODECS, "int8")] == [*CODECS, "int8"]
    assert [coded_form(dtype) for dtype in ("bfloat16", "int8", "float32")] == ["lossless", "int8", "none"]


@pytest.mark.parametrize(
    ("dtype", "codec", "sentence"),
    [
        ("float32", "lossless", "codec lossless packs bfloat16, and these features are kept in float32"),
        ("int8", "lossless", "codec lossless packs bfloat16, and these features are kept in int8"),
        ("bfloat16", "zip", "codec is 'zip', which is not one of none, lossless"),
        ("bfloat16", "int8", "codec is 'int8', which is not one of none, lossless"),
    ],
)
def test_a_codec_that_does_not_fit_is_refused(dtype: str, codec: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        shard_codec(dtype, codec)


@pytest.mark.parametrize("name", ["zip", "", "None", "Lossless"])
def test_an_unknown_codec_is_refused_and_not_taken_for_none(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"codec is '{name}', which is not one of none, lossless, int8"):
        codec_for(name)


def test_without_zstandard_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    lossless._tools.cache_clear()
    for use in (CODEC.prepare, lambda: packed(values_of("equal", 4))):
        with pytest.raises(SettingsError, match=r"pip install 'vggt-feature-cache\[codec\]'"):
            use()

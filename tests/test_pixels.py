"""Identity by pixels: one feature, two keys, found by either, never a wrong one."""

from __future__ import annotations

import hashlib
import multiprocessing
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from store_kit import equal, make_feature, make_spec
from vggt_cache.errors import (
    CacheNotFoundError,
    FrameError,
    MissingFeatureError,
    SettingsError,
    SpecMismatchError,
)
from vggt_cache.frames import decode_frame
from vggt_cache.identity import FeatureSpec, Preprocessing, feature_key, frame_digest, pixel_digest, pixel_key
from vggt_cache.pixel_cache import PixelCache
from vggt_cache.pixels import as_levels, pixels_of
from vggt_cache.store import FeatureCache, ShardWriter, create_store
from vggt_cache.store.siblings import SameTable

SPEC = make_spec(context="causal", image_size=28)


def draw(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path


def seen(path: Path, spec: FeatureSpec = SPEC) -> np.ndarray:
    """The pixels [H, W, 3] that the encoder sees of a file."""
    return decode_frame(path.read_bytes(), spec.preprocessing)


def key_of_files(paths: list[Path], spec: FeatureSpec = SPEC) -> bytes:
    return feature_key(spec, [frame_digest(path.read_bytes()) for path in paths])


def key_of_pixels(paths: list[Path], spec: FeatureSpec = SPEC) -> bytes:
    return pixel_key(spec, [pixel_digest(seen(path, spec)) for path in paths])


def store(cache_dir: Path, spec: FeatureSpec, key: bytes, number: int) -> None:
    with ShardWriter(create_store(cache_dir, spec), spec) as writer:
        writer.append(key, make_feature(number, spec))
        writer.commit()


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [draw(tmp_path / f"{number}.png", number) for number in range(2)]


def stored_by_files(cache_dir: Path, paths: list[Path]) -> Path:
    """As precompute leaves it: the feature under the key of the files, and the pair."""
    store(cache_dir, SPEC, key_of_files(paths), 7)
    SameTable(str(cache_dir)).note([(key_of_pixels(paths), key_of_files(paths), SPEC)])
    return cache_dir


# ---------------------------------------------------------------- digests


def test_a_digest_is_of_a_domain_a_dtype_a_size_and_the_bytes_row_by_row() -> None:
    levels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    head = b"vggt-feature-cache pixels 1\0"
    assert (
        pixel_digest(levels)
        == hashlib.sha256(head + b"u8\0" + struct.pack("<II", 2, 4) + bytes(range(24))).digest()
    )
    values = levels.astype(np.float32)
    body = struct.pack("<24f", *range(24))
    assert pixel_digest(values) == hashlib.sha256(head + b"f32\0" + struct.pack("<II", 2, 4) + body).digest()
    turned = np.ascontiguousarray(levels.transpose(1, 0, 2)).transpose(1, 0, 2)
    assert pixel_digest(turned) == pixel_digest(levels)  # not contiguous
    assert pixel_digest(levels.reshape(4, 2, 3)) != pixel_digest(levels)


def test_the_key_by_pixels_leaves_the_preprocessing_out_and_the_key_by_files_does_not() -> None:
    other = make_spec(context="causal", image_size=56)
    digests = [bytes(32)]
    assert pixel_key(SPEC, digests) == pixel_key(other, digests)
    assert feature_key(SPEC, digests) != feature_key(other, digests)
    assert pixel_key(make_spec(image_size=28), digests) != pixel_key(SPEC, digests)
    assert pixel_key(SPEC, digests) != feature_key(SPEC, digests)


def test_old_fingerprints_stay_and_that_of_given_pixels_reads_back() -> None:
    assert make_spec().fingerprint == "bace6b025e69f4f45319a0cab3a4aa396a28d79d19eda369e95eaef84ed2b8b9"
    given = SPEC.of_given_pixels
    assert FeatureSpec.from_json(given.to_json()) == given
    assert given.of_given_pixels == given


@pytest.mark.parametrize(
    "wrong", [{"image_size": 0}, {"image_size": 28, "resize_mode": "given"}, {"alpha": "given"}]
)
def test_given_is_all_or_nothing(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Preprocessing(**wrong)  # type: ignore[arg-type]


def test_every_level_divided_as_torchvision_does_is_that_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    image = levels.repeat(3, 2, 1)  # [3, 2, 256]
    (found,) = as_levels(image.float().div(255)[None])
    assert found.dtype == np.uint8
    assert (found == levels.numpy()[None, :, None]).all()
    assert np.array_equal(as_levels(image[None])[0], found)


@pytest.mark.parametrize("change", [1e-7, float("nan"), float("inf"), -1.0])
def test_a_frame_with_one_other_value_is_its_float_bytes_and_its_neighbour_is_not(change: float) -> None:
    images = torch.full((2, 3, 14, 14), 51 / 255)
    images[1, 2, 3, 4] += change
    first, second = as_levels(images)
    assert first.dtype == np.uint8
    assert (first == 51).all()
    assert second.dtype == np.float32
    assert np.array_equal(second, images[1].permute(1, 2, 0).numpy(), equal_nan=True)


def test_half_precision_is_taken_at_its_value() -> None:
    image = torch.full((1, 3, 14, 14), 0.3, dtype=torch.bfloat16)
    assert np.array_equal(as_levels(image)[0], image[0].float().permute(1, 2, 0).numpy())


# ---------------------------------------------------------------- found by either


def test_what_was_made_from_files_is_found_by_their_pixels_in_any_form(
    tmp_path: Path, paths: list[Path]
) -> None:
    arrays = [seen(path) for path in paths]
    tensors = [torch.from_numpy(one).permute(2, 0, 1) for one in arrays]
    with FeatureCache.open(stored_by_files(tmp_path / "cache", paths), context="causal") as cache:
        for frames in (
            paths,
            [Image.open(path) for path in paths],
            arrays,
            tensors,
            torch.stack(tensors),
            torch.stack(tensors).float().div(255),
            [paths[0], tensors[1]],
            [paths[0].read_bytes(), Image.open(paths[1])],
        ):
            assert equal(cache.get(frames), make_feature(7, SPEC))
        out = torch.empty_like(make_feature(7, SPEC))
        assert equal(cache.get(tensors, out=out), make_feature(7, SPEC))
        assert out.data_ptr() == cache.get(tensors, out=out).data_ptr()  # type: ignore[union-attr]


def test_other_pixels_find_nothing(tmp_path: Path, paths: list[Path]) -> None:
    with FeatureCache.open(stored_by_files(tmp_path / "cache", paths), context="causal") as cache:
        images = torch.stack([torch.from_numpy(seen(path)).permute(2, 0, 1) for path in paths])
        marked = images.clone()
        marked[1, 0, 0, 0] ^= 1
        for frames in (marked, images.flip(0), images[:1], images.float().div(256), images.transpose(2, 3)):
            assert cache.get(frames) is None
            with pytest.raises(MissingFeatureError):
                cache.get(frames, strict=True)


def test_what_was_given_as_pixels_is_found_by_pixels_and_where_the_pair_is_noted_by_files(
    tmp_path: Path, paths: list[Path]
) -> None:
    cache_dir, given = tmp_path / "cache", SPEC.of_given_pixels
    store(cache_dir, given, key_of_pixels(paths), 3)
    create_store(cache_dir, SPEC)
    with (
        FeatureCache.open(cache_dir, spec=SPEC) as cache,
        FeatureCache.open(cache_dir, spec=given) as of_pixels,
    ):
        images = [seen(path) for path in paths]
        assert equal(of_pixels.get(images), make_feature(3, SPEC))
        assert equal(cache.get(images), make_feature(3, SPEC))
        assert cache.get(paths) is None  # nobody has seen these files' pixels
        SameTable(str(cache_dir)).note([(key_of_files(paths), key_of_pixels(paths), given)])
        cache.refresh()
        assert equal(cache.get(paths), make_feature(3, SPEC))
        assert key_of_files(paths) in cache
        with pytest.raises(SettingsError, match="given as a file"):
            of_pixels.get([paths[0], images[1]])


def test_a_pair_is_followed_only_within_one_encoder_context_and_dtype(
    tmp_path: Path, paths: list[Path]
) -> None:
    """A row that names a store of another kind, as only damage or malice could write it."""
    cache_dir = stored_by_files(tmp_path / "cache", paths)
    other = make_spec(context="causal", image_size=28, feature_dtype="float32")
    store(cache_dir, other, key_of_files(paths, other), 9)
    SameTable(str(cache_dir)).note([(key_of_pixels(paths), key_of_files(paths, other), other)])
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        assert cache.get([seen(path) for path in paths]) is None


def test_a_pair_whose_feature_is_gone_or_whose_table_is_torn_costs_a_miss(
    tmp_path: Path, paths: list[Path]
) -> None:
    cache_dir = stored_by_files(tmp_path / "cache", paths)
    (rows,) = (cache_dir / "same").iterdir()
    images = [seen(path) for path in paths]
    data = rows.read_bytes()
    for damage in (data[:-1], data[:30] + bytes([data[30] ^ 1]) + data[31:], b""):
        rows.write_bytes(damage)
        with FeatureCache.open(cache_dir, context="causal") as cache:
            assert cache.get(images) is None
            assert equal(cache.get(paths), make_feature(7, SPEC))
    rows.write_bytes(data)
    for shard in (cache_dir / SPEC.short_name / "shards").iterdir():
        shard.unlink()
    with FeatureCache.open(cache_dir, spec=SPEC) as cache:
        assert cache.get(images) is None


def _get(cache: FeatureCache, frames: list[np.ndarray], results: multiprocessing.Queue[object]) -> None:
    feature = cache.get(frames)
    results.put(None if feature is None else feature.float().numpy())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_follows_pairs_too(tmp_path: Path, paths: list[Path], method: str) -> None:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    images = [seen(path) for path in paths]
    with FeatureCache.open(stored_by_files(tmp_path / "cache", paths), context="causal") as cache:
        assert cache.get(images) is not None
        process = context.Process(target=_get, args=(cache, images, results))
        process.start()
        found = results.get(timeout=60)
        process.join()
    assert np.array_equal(found, make_feature(7, SPEC).float().numpy())


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "frame",
    [
        torch.zeros(14, 14),
        torch.zeros(1, 14, 14),
        torch.zeros(3, 14, 14, dtype=torch.int64),
        np.zeros((14, 14, 4)),
        7,
    ],
)
def test_what_is_no_pixels_is_refused(frame: object) -> None:
    with pytest.raises(SettingsError, match="a frame is"):
        pixels_of(frame, SPEC.preprocessing)


def test_a_picture_is_refused_as_its_file_would_be() -> None:
    with pytest.raises(FrameError, match="no patches"):
        pixels_of(Image.new("RGB", (2000, 2)), SPEC.preprocessing)


def test_a_cache_of_given_pixels_names_itself(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC.of_given_pixels)
    with pytest.raises(SpecMismatchError, match="pixels as given"):
        FeatureCache.open(tmp_path, spec=make_spec())


def test_a_cache_that_is_opened_without_saying_which_is_meant_warns(tmp_path: Path) -> None:
    create_store(tmp_path, SPEC)
    with pytest.warns(UserWarning, match="without saying which context"):
        FeatureCache.open(tmp_path).close()


# ---------------------------------------------------------------- for somebody's own code


def test_keys_of_tensors_are_those_of_the_frames_that_the_context_uses(
    tmp_path: Path, paths: list[Path]
) -> None:
    images = torch.stack([torch.from_numpy(seen(path)).permute(2, 0, 1) for path in paths])
    cache = PixelCache(tmp_path, SPEC, fill=True)
    both, turned = cache.keys(torch.stack([images, images.flip(0)]))
    assert both == key_of_pixels(paths)
    assert turned == key_of_pixels(paths[::-1])
    assert cache.keys([images.float().div(255), images[:1]]) == [both, key_of_pixels(paths[:1])]
    cache.close()
    frame = make_spec(image_size=28)
    alone = PixelCache(tmp_path, frame, fill=True)
    assert alone.keys([images]) == [pixel_key(frame, [pixel_digest(seen(paths[1]))])]
    alone.close()


def test_what_is_put_is_found_after_flush_by_pixels_here_and_elsewhere(tmp_path: Path) -> None:
    cache, other = PixelCache(tmp_path, SPEC, fill=True), PixelCache(tmp_path, SPEC, fill=True)
    lists = torch.rand(2, 2, 3, 14, 14)
    keys = cache.keys(lists)
    cache.put(keys, torch.stack([make_feature(1, SPEC), make_feature(2, SPEC)]))
    cache.put(keys[::-1], torch.stack([make_feature(2, SPEC), make_feature(1, SPEC)]))
    cache.flush()
    other.flush()
    for one in (cache, other):
        assert [equal(one.get(key), make_feature(n, SPEC)) for n, key in enumerate(keys, 1)] == [True, True]
        assert len(one.cache) == 2
    bad = make_feature(3, SPEC)
    bad[0, 0, 0] = float("nan")
    (key,) = cache.keys(lists[:1] / 2)
    cache.put([key], bad[None])
    cache.flush()
    assert cache.lost == [key.hex()]
    assert key not in cache
    cache.close()
    other.close()


def test_without_fill_the_stores_that_are_there_serve_and_nothing_is_made(
    tmp_path: Path, paths: list[Path]
) -> None:
    with pytest.raises(CacheNotFoundError):
        PixelCache(tmp_path / "cache", SPEC)
    cache_dir = stored_by_files(tmp_path / "cache", paths)
    before = sorted(cache_dir.iterdir())
    cache = PixelCache(cache_dir, SPEC)
    (key,) = cache.keys([torch.stack([torch.from_numpy(seen(path)).permute(2, 0, 1) for path in paths])])
    assert equal(cache.get(key), make_feature(7, SPEC))
    assert sorted(cache_dir.iterdir()) == before
    cache.close()

"""The picture shows features truthfully: one basis for all, each beside its frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFont

from vggt_cache import picture
from vggt_cache.errors import SettingsError, StoreError
from vggt_cache.picture import draw_features, joint_colours


def _feature(seed: int = 0, shape: tuple[int, int, int] = (4, 5, 16)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32)


def _frame(width: int = 70, height: int = 56, shade: int = 40) -> np.ndarray:
    return np.full((height, width, 3), shade, np.uint8)


def _drawn(rows: list, path: Path) -> np.ndarray:
    draw_features(rows, path)
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


# ---------------------------------------------------------------- colours


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4), st.integers(1, 12))
def test_colours_have_the_shapes_of_their_features(grids, channels):
    features = [_feature(seed, (*grid, channels)) for seed, grid in enumerate(grids)]
    colours = joint_colours(features)
    assert [colour.shape for colour in colours] == [(*grid, 3) for grid in grids]
    assert all(colour.dtype == np.uint8 for colour in colours)


@given(st.integers(0, 1000))
def test_equal_patches_have_equal_colours_wherever_they_stand(seed):
    first, second = _feature(seed), _feature(seed + 1)
    second[0, 0], second[3, 4] = first[2, 1], first[0, 3]
    one, two, again = joint_colours([first, second, first.copy()])
    assert np.array_equal(one, again)
    assert np.array_equal(two[0, 0], one[2, 1])
    assert np.array_equal(two[3, 4], one[0, 3])


def test_the_basis_is_of_all_features_together():
    near, far = _feature(1), _feature(2) + 100
    together = joint_colours([near, far])
    assert np.abs(together[0].astype(int)[..., 0] - together[1].astype(int)[..., 0]).min() > 200
    assert not np.array_equal(together[0], joint_colours([near])[0])


@given(st.integers(0, 1000))
def test_colours_follow_the_first_three_principal_components(seed):
    """Against a singular value decomposition, up to the sign of each component."""
    feature = _feature(seed, (8, 9, 6)) * np.array([9, 5, 3, 1, 0.5, 0.1], np.float32)
    rows = feature.reshape(-1, 6).astype(np.float64)
    rows -= rows.mean(axis=0)
    scores = rows @ np.linalg.svd(rows, full_matrices=False)[2][:3].T
    colours = joint_colours([feature])[0].reshape(-1, 3)
    for component in range(3):
        low, high = np.percentile(scores[:, component], [1, 99])
        shade = ((scores[:, component] - low) / (high - low)).clip(0, 1) * 255
        flipped = ((high - scores[:, component]) / (high - low)).clip(0, 1) * 255
        assert min(np.abs(colours[:, component] - one).max() for one in (shade, flipped)) <= 1


@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(-50, 50))
def test_colours_do_not_depend_on_scale_or_offset(seed, scale, offset):
    feature = _feature(seed).astype(np.float64)
    changed = joint_colours([feature * scale + offset])[0].astype(int)
    assert np.abs(changed - joint_colours([feature])[0]).max() <= 1


def test_a_components_sign_is_fixed_by_its_largest_entry():
    """The axis of variance is channel 2: its larger values are the brighter ones."""
    feature = np.zeros((1, 50, 4), np.float32)
    feature[0, :, 2] = np.arange(50)
    for sign in (1, -1):
        red = joint_colours([feature * sign])[0][0, :, 0].astype(int)
        assert (np.diff(red) * sign >= 0).all()
        assert set(red[[0, -1]]) == {0, 255}


def test_a_picture_does_not_depend_on_the_sign_that_the_eigenvectors_happen_to_have(monkeypatch):
    expected = joint_colours([_feature()])
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    assert np.array_equal(joint_colours([_feature()]), expected)


def test_outliers_do_not_darken_the_rest():
    feature = _feature(3, (20, 20, 8))
    feature[0, 0] *= 1000
    assert joint_colours([feature])[0][..., 1].std() > 40


@pytest.mark.parametrize("value", [0.0, 1.7, -1e30, 3e-39])
def test_constant_features_are_grey(value):
    features = [np.full((3, 4, 8), value, np.float32), np.full((2, 2, 8), value, np.float32)]
    assert {int(shade) for colour in joint_colours(features) for shade in colour.flat} == {128}


def test_constants_up_to_float32_rounding_are_grey():
    jitter = np.random.default_rng(0).integers(0, 2, (6, 7, 8)).astype(bool)
    feature = np.where(jitter, np.float32(1.7), np.nextafter(np.float32(1.7), np.float32(2)))
    assert set(joint_colours([feature])[0].flat) == {128}


@pytest.mark.parametrize("rest", [0.0, 1e-6])
def test_rounding_noise_gets_no_colour(rest):
    """Features along one direction: red carries them, green and blue have nothing to show."""
    amounts = np.random.default_rng(0).standard_normal((6, 7, 1)).astype(np.float32)
    feature = amounts * _feature(1, (1, 1, 32)) + rest * _feature(2, (6, 7, 32))
    colours = joint_colours([feature])[0]
    assert colours[..., 0].std() > 40
    assert set(colours[..., 1:].flat) == {128}


def test_many_patches_are_thinned_for_the_basis_and_still_coloured_alike(monkeypatch):
    basis = np.random.default_rng(0).standard_normal((3, 16)) * np.array([[9.0], [5.0], [2.0]])
    features = [(_feature(seed, (20, 20, 3)) @ basis).astype(np.float32) for seed in range(3)]
    whole = joint_colours(features)
    monkeypatch.setattr(picture, "_BASIS_PATCHES", 300)
    assert len(picture._spread_patches(features)) <= 300
    thinned = joint_colours(features)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(whole, thinned, strict=True)) < 25


# ---------------------------------------------------------------- picture


def test_each_feature_stands_enlarged_beside_its_frame(tmp_path):
    frames = [_frame(shade=40), _frame(shade=90)]
    features = [_feature(0), _feature(1)]
    picture = _drawn([(frames[i], features[i], f"frame {i}") for i in range(2)], tmp_path / "out.png")
    for frame, colours in zip(frames, joint_colours(features), strict=True):
        ys, xs = np.nonzero((picture == frame[0, 0]).all(axis=2))
        top, left = ys.min(), xs.min()
        assert (picture[top : top + 56, left : left + 70] == frame).all()
        beside = picture[top : top + 56, left + 78 : left + 148]
        assert np.array_equal(beside, colours.repeat(14, axis=0).repeat(14, axis=1))


@pytest.mark.parametrize("count", [1, 4, 5, 9, 30])
def test_all_rows_are_shown_in_columns_that_keep_the_picture_broad_rather_than_endless(tmp_path, count):
    frames = [_frame(30, 28, shade) for shade in range(1, count + 1)]
    picture = _drawn([(frame, _feature(1), "x") for frame in frames], tmp_path / "out.png")
    for frame in frames:
        assert (picture == frame[0, 0]).all(axis=2).sum() >= frame.shape[0] * frame.shape[1]
    assert picture.shape[0] < 8 * picture.shape[1]


def test_frames_of_different_sizes_do_not_overlap(tmp_path):
    rows = [(_frame(30, 60, 11), _feature(1), ""), (_frame(90, 20, 22), _feature(2), "")]
    picture = _drawn(rows, tmp_path / "out.png")
    for frame, _, _ in rows:
        assert (picture == frame[0, 0]).all(axis=2).sum() == frame.shape[0] * frame.shape[1]


def test_captions_are_written_and_long_or_foreign_ones_do_no_harm(tmp_path):
    blank = _drawn([(_frame(), _feature(), "")], tmp_path / "blank.png")
    for caption in ("episode 1", "x/" * 500 + "end.png", "路径/帧.png", "two\nlines"):
        picture = _drawn([(_frame(), _feature(), caption)], tmp_path / "out.png")
        assert picture.shape == blank.shape
        changed = (picture != blank).any(axis=2)
        assert changed.any()
        assert not changed[: 8 + 56].any()  # nothing is written over frame or feature


def test_a_long_caption_keeps_its_end_and_stays_below_its_own_frame(tmp_path):
    rows = [(_frame(), _feature(seed), "") for seed in range(5)]
    blank = _drawn(rows, tmp_path / "blank.png")
    ends = []
    for end in ("0001.png", "0002.png"):
        rows[0] = (_frame(), rows[0][1], "long/" * 100 + end)
        ends.append(_drawn(rows, tmp_path / "out.png"))
        columns = np.nonzero((ends[-1] != blank).any(axis=(0, 2)))[0]
        assert columns.max() < blank.shape[1] // 2
    assert not np.array_equal(*ends)


def test_captions_need_no_font_but_pillows_oldest(tmp_path, monkeypatch):
    if not hasattr(ImageFont, "load_default_imagefont"):
        pytest.skip("this Pillow cannot be asked for its oldest font")
    font = ImageFont.load_default_imagefont()
    monkeypatch.setattr(ImageFont, "load_default", lambda: font)
    draw_features([(_frame(), _feature(), "路径/帧.png")], tmp_path / "out.png")


def test_equal_rows_give_equal_bytes(tmp_path):
    rows = [(_frame(), _feature(seed), f"frame {seed}") for seed in range(5)]
    draw_features(rows, tmp_path / "one.png")
    draw_features([(p.copy(), f.copy(), c) for p, f, c in rows], tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_feature_with_nan_is_refused_by_name(tmp_path, value):
    bad = _feature()
    bad[1, 2, 3] = value
    with pytest.raises(StoreError, match=r"the feature of bad\.png holds NaN or infinity"):
        draw_features([(_frame(), _feature(), "good.png"), (_frame(), bad, "bad.png")], tmp_path / "out.png")
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "there is no feature to draw"),
        (
            [(_frame(), _feature(0, (2, 2, 8)), "a"), (_frame(), _feature(0, (2, 2, 4)), "b")],
            "have 4, 8 channels",
        ),
        ([(_frame()[..., 0], _feature(), "a")], "the frame of a is uint8 [56, 70]"),
        ([(_frame().astype(np.float32), _feature(), "a")], "the frame of a is float32 [56, 70, 3]"),
        ([(_frame(), _feature()[0], "a")], "the feature of a is float32 [5, 16]"),
        ([(_frame(), _feature()[:0], "a")], "the feature of a is float32 [0, 5, 16]"),
        ([(_frame(2000, 2000), _feature(), "a")] * 20, "over the limit of 100000000: draw fewer"),
    ],
)
def test_what_makes_no_picture_is_refused(tmp_path, rows, reason):
    with pytest.raises(SettingsError) as refusal:
        draw_features(rows, tmp_path / "out.png")
    assert reason in str(refusal.value)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"cannot be written to .* \(No such file or directory\)"):
        draw_features([(_frame(), _feature(), "a")], tmp_path / "absent" / "out.png")

"""Lists in the order of letters, and steps that are missing, are told once a run where features depend on them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vggt_cache.samples import Sample
from vggt_cache.samples.order import OrderWatch, swapped_by_letters


@pytest.mark.parametrize(
    ("frames", "pair"),
    [
        (["frame_1.png", "frame_10.png", "frame_2.png"], ("frame_10.png", "frame_2.png")),
        (["a/9/x_10.jpg", "a/9/x_9.jpg"], ("a/9/x_10.jpg", "a/9/x_9.jpg")),
        (["frame_1.png", "frame_2.png", "frame_10.png"], None),
        (["frame_10.png", "frame_1.png", "frame_2.png"], None),
        (["0001.png", "0002.png", "0010.png"], None),
        (["a.png", "bb.png", "ccc.png"], None),
        (["a.png", "a1.png"], None),
        (["5.png"], None),
        ([], None),
    ],
)
def test_the_order_of_letters_is_told_from_that_of_numbers(frames, pair):
    assert swapped_by_letters(frames) == pair


@given(st.lists(st.integers(0, 10**6), max_size=9))
def test_numbers_in_their_order_are_never_suspect(numbers):
    assert swapped_by_letters([f"{number}.png" for number in sorted(numbers)]) is None


def _samples(frames: list[tuple[str, ...]], steps: dict[str, list[int]]) -> list[Sample]:
    listed = [
        Sample(frames=names, bases=(), source=f"a:{at}", record={}, layout="structured")
        for at, names in enumerate(frames, 1)
    ]
    walked = [
        Sample(frames=("x",), bases=(), source="", record={"episode": e, "step": s}, layout="episode")
        for e, numbers in steps.items() for s in numbers
    ]  # fmt: skip
    return listed + walked


def test_each_kind_is_one_sentence_with_its_count_and_the_first():
    watch = OrderWatch()
    bad = ("f10.png", "f9.png")
    samples = _samples([("f9.png", "f10.png"), bad, bad], {"e1": [3, 4, 5], "e2": [0, 1, 3, 4, 9], "e3": [9]})
    assert list(watch.passing(samples)) == samples
    by_letters, gaps = watch.sentences()
    assert by_letters.startswith(
        "2 lists of frames are in the order of letters, not of numbers (the first: a:2, "
    )
    assert "'f10.png' before 'f9.png'" in by_letters
    assert gaps.startswith(
        "2 steps of episodes follow one that is not the one before (the first: 'e2', step 3 after 1)"
    )


def test_nothing_is_said_of_data_in_order():
    watch = OrderWatch()
    list(watch.passing(_samples([("f9.png", "f10.png")], {"e1": [3, 4], "e2": [0, 1]})))
    assert not list(watch.sentences())

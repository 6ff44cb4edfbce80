"""Whether a sample is nested too deeply does not depend on who reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

from vggt_cache.samples import Problem, SampleIndex, find_sources, iter_samples
from vggt_cache.samples.annotations import MAX_NESTING

T = TypeVar("T")
GOOD = '{"images": ["a.png"]}'


def deeper(frames: int, call: Callable[[], T]) -> T:
    """Call it with so much of the stack in use."""
    return deeper(frames - 1, call) if frames else call()


def nested(record: str, depth: int) -> str:
    """The record, its innermost value `depth` brackets deep."""
    brackets = depth - record.count("{") - record.count("[")
    return record.replace("?", "[" * brackets + "]" * brackets)


RECORDS = [
    '{"images": [?]}',
    '{"image": ?}',
    '{"data_path": ?, "image": "a.png"}',
    '{"x": ?, "image": "a.png"}',
]


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_both_readers_agree_at_every_depth_and_with_any_stack(tmp_path: Path, record: str, end: str) -> None:
    for depth in (MAX_NESTING, MAX_NESTING + 1, 500, *range(940, 1000)):
        records = [GOOD, nested(record, depth), GOOD]
        text = "\n".join(records) if end == "jsonl" else f"[{','.join(records)}]"
        (tmp_path / f"train.{end}").write_text(text)
        sources, problems = find_sources(tmp_path), list[Problem]()
        samples = list(iter_samples(sources, on_problem=problems.append))
        index = deeper(150, lambda sources=sources: SampleIndex(sources, on_problem=lambda problem: None))
        assert len(samples) == len(index) == deeper(300, lambda index=index: len(list(index)))
        assert len(problems) == (0 if depth <= MAX_NESTING and record == RECORDS[-1] else 1)
        assert depth <= MAX_NESTING or "nested too deeply" in problems[0].reason


def test_brackets_beside_each_other_are_not_nested(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"image": "a.png", "x": [' + ",".join(["[[]]"] * 200) + "]}")
    assert (
        len(
            list(iter_samples(find_sources(tmp_path), on_problem=lambda problem: pytest.fail(problem.reason)))
        )
        == 1
    )

"""Trials with annotation files and episode folders that somebody made who means harm."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from random import Random

from small_data import write_image
from trials.annotation_mutations import hostile_episode, hostile_file
from trials.children import Child, limit_memory
from vggt_cache.errors import DataError
from vggt_cache.samples import (
    FrameTable,
    Problem,
    Sample,
    SampleIndex,
    find_sources,
    iter_samples,
    read_episode_text,
)
from vggt_cache.samples.annotations import MAX_RECORD_BYTES

FOLDERS_PER_SEED = 20
FILES_PER_FOLDER = 25
EPISODES_PER_FOLDER = 2
LONGEST_S = 30.0
"""Of processor time for all files of a folder; most folders take a hundredth of it."""
MOST_MEMORY_BYTES = 64 * MAX_RECORD_BYTES
"""A record is there as bytes, as text with up to 4 bytes a character, and as the objects that it unfolds into."""


def hostile_annotations(seed: int, folder: Path, *, folders: int = FOLDERS_PER_SEED) -> int:
    """Each file and each episode gives samples or problems, in bounded time and memory; both readers agree."""
    with Child(partial(_read_many, Random(seed), folders, folder), folder / "log") as child:
        child.well()
    return folders * (FILES_PER_FOLDER + EPISODES_PER_FOLDER)


def _read_many(random: Random, folders: int, folder: Path) -> None:
    limit_memory(MOST_MEMORY_BYTES)
    for _ in range(folders):
        root = _write(folder / "root", random)
        started_s = time.process_time()
        _read(root)
        assert time.process_time() - started_s < LONGEST_S, os.listdir(root)
        shutil.rmtree(root)


def _write(root: Path, random: Random) -> Path:
    """What annotations may name is there too: images, a loop of links, a pipe."""
    write_image(root / "a" / "000.png", 0, (2, 2))
    write_image(root / "b.png", 1, (2, 2))
    (root / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    for number in range(FILES_PER_FOLDER):
        end, data = hostile_file(random)
        (root / f"{number:02d}{end}").write_bytes(data)
    for number in range(EPISODES_PER_FOLDER):
        names, milestones = hostile_episode(random)
        (root / f"episode-{number}").mkdir()
        (root / f"episode-{number}" / "milestones_result.json").write_bytes(milestones)
        for name in names:
            (root / f"episode-{number}" / name).touch()
    return root


def _read(root: Path) -> None:
    sources = find_sources(root)
    problems: list[Problem] = []
    samples = list(iter_samples(sources, on_problem=problems.append))
    for sample in samples:
        _check_sample(sample)
    assert all(problem.reason and len(problem.reason) < 500 for problem in problems)
    _check_index(SampleIndex(sources, on_problem=lambda problem: None), samples)
    _check_frames(samples)
    for sample in samples:
        if sample.layout == "episode":
            with suppress(DataError):
                read_episode_text(sample)


def _check_sample(sample: Sample) -> None:
    assert all(isinstance(name, str) and name and "\0" not in name for name in sample.frames)
    assert all(isinstance(base, str) and os.path.isabs(base) for base in sample.bases)
    assert isinstance(sample.record, dict)


def _check_index(index: SampleIndex, samples: list[Sample]) -> None:
    """Read one by one, they are the same; their records are compared by their fields: a record may be deep."""
    assert len(index) == len(samples)
    for at, sample in enumerate(samples):
        again = index[at]
        assert (again.frames, again.bases, again.source) == (sample.frames, sample.bases, sample.source)
        assert list(again.record) == list(sample.record)
        assert index.frame_counts[at] == len(sample.frames)
        assert index.lengths[at] >= 0


def _check_frames(samples: list[Sample]) -> None:
    """Every name leads to a path, which may have no file; none is opened."""
    table = FrameTable()
    references = [table.add(sample) for sample in samples]
    table.resolve(threads=1)
    for numbers in references:
        for number in numbers:
            frame = table.frame_ids()[number]
            assert os.path.isabs(table.paths[frame])
            table.state(frame)

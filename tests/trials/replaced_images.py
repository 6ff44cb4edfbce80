"""Trials in which images change under the cache: a feature is that of the bytes that are there, or there is none."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from unittest import mock

import torch
from PIL import Image

from small_data import SIZE, write_annotations
from trials.toy_encoder import ToyCheckpoint, toy_encoder, toy_feature
from vggt_cache.cli import main
from vggt_cache.errors import FrameError
from vggt_cache.frames import read_frame
from vggt_cache.identity import Preprocessing
from vggt_cache.precompute import digests, pipeline
from vggt_cache.store import FeatureCache

TRIALS_PER_SEED = 20
IMAGES = 5
SETTLE_S = 0.06
"""After so long without a change, digests of image files are written down and believed."""
_PREPROCESSING = Preprocessing(image_size=56)
_OK, _INCOMPLETE = 0, 3


class Images:
    """A few image files of equal length, and what may happen to them."""

    def __init__(self, folder: Path, random: Random) -> None:
        self.folder, self.random = folder, random
        self.paths = [folder / f"{number}.bmp" for number in range(IMAGES)]
        folder.mkdir(parents=True)
        for path in self.paths:
            path.write_bytes(self.content())
        self.lists = [self.paths[: count + 1] for count in range(IMAGES)]
        self.lists += [random.sample(self.paths, 3) for _ in range(3)]
        names = [[path.name for path in paths] for paths in self.lists]
        write_annotations(folder / "train.jsonl", names)

    def content(self) -> bytes:
        """A picture that no other is like. BMP: every byte of the pixels may be another, and it stays a picture."""
        buffer = io.BytesIO()
        Image.frombytes("RGB", (56, 42), self.random.randbytes(56 * 42 * 3)).save(buffer, "BMP")
        return buffer.getvalue()

    def disturb(self) -> None:
        """One change of one or two of the files, with time stamps put back where that is possible."""
        kinds = (self._in_place, self._in_place, self._another_file, self._swap, self._turn, self._rename)
        with contextlib.suppress(FileNotFoundError):
            self.random.choice(kinds)()

    def _in_place(self) -> None:
        path = self.random.choice(self.paths)
        before = os.stat(path)
        with path.open("r+b") as file:
            file.write(self.content())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def _another_file(self) -> None:
        path = self.random.choice(self.paths)
        before = os.stat(path)
        new = self.folder / ".new"
        new.write_bytes(self.content())
        os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
        new.replace(path)

    def _swap(self) -> None:
        self._move_round(self.random.sample(self.paths, 2))

    def _turn(self) -> None:
        self._move_round(self.random.sample(self.paths, 3))

    def _move_round(self, paths: list[Path]) -> None:
        spare = self.folder / ".spare"
        paths[0].rename(spare)
        for to, source in pairwise(paths):
            if source.exists():
                source.rename(to)
        spare.rename(paths[-1])

    def _rename(self) -> None:
        """Away, or back again."""
        path = self.random.choice(self.paths)
        away = path.with_suffix(".away")
        if away.exists():
            away.rename(path)
        else:
            path.rename(away)

    def restore(self) -> None:
        for path in self.paths:
            if not path.exists():
                path.write_bytes(self.content())


def replaced_images(seed: int, folder: Path, *, trials: int = TRIALS_PER_SEED) -> int:
    """Images are changed before, while and after the real pipeline runs over them with a toy encoder."""
    random = Random(seed)
    for number in range(trials):
        _one_trial(folder / str(number), random, random.choice(("frame", "causal")))
    return trials


def _one_trial(folder: Path, random: Random, context: str) -> None:
    images = Images(folder / "data", random)
    cache_dir = folder.parent / f"{folder.name}-cache"
    for _ in range(random.randint(1, 3)):
        if random.random() < 0.4:
            time.sleep(SETTLE_S)
        with _disturbed(images, random.choice((0.0, 0.1, 0.3))):
            assert _run(images, cache_dir, context) in (_OK, _INCOMPLETE)
        _check(images, cache_dir, context)
        for _ in range(random.randint(0, 3)):
            images.disturb()
            _check(images, cache_dir, context)
    images.restore()
    assert _run(images, cache_dir, context) == _OK
    assert _check(images, cache_dir, context) == len(images.lists)


def _run(images: Images, cache_dir: Path, context: str) -> int:
    place = ["--data_root", str(images.folder), "--cache_dir", str(cache_dir), "--context", context]
    flags = [*place, *SIZE, "--feature_dtype", "float32", "--vggt_model_path", "toy"]
    with (
        toy_encoder(ToyCheckpoint()),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        return main(["precompute", *flags])


def _check(images: Images, cache_dir: Path, context: str) -> int:
    """Every answer is right for the files as they are now; returns how many features are there."""
    found = 0
    with FeatureCache.open(cache_dir) as cache:
        for paths in images.lists:
            used = paths[-1:] if context == "frame" else paths
            try:
                feature = cache.get(paths)
            except FrameError:
                assert not all(path.exists() for path in used)
                continue
            if feature is not None:
                found += 1
                right = toy_feature([path.read_bytes() for path in used], context, _PREPROCESSING)
                assert torch.equal(feature, right), f"the feature of {paths[-1].name} is that of other bytes"
    return found


# ---------------------------------------------------------------- while a run reads and encodes


@contextmanager
def _disturbed(images: Images, rate: float) -> Iterator[None]:
    """Images change before, in the middle of and after reading one, and between decoding and encoding."""

    def may_disturb() -> None:
        if images.random.random() < rate:
            images.disturb()

    def read(path: str) -> bytes:
        may_disturb()
        torn = images.random.random() < rate
        data = _read_half_written(Path(path), images) if torn else read_frame(path)
        may_disturb()
        return data

    with (
        mock.patch.object(digests, "read_frame", read),
        mock.patch.object(digests, "file_state", _after(may_disturb, digests.file_state)),
        mock.patch.object(pipeline, "feature_key", _after(may_disturb, pipeline.feature_key)),
    ):
        yield


def _after(first: Callable[[], None], call: Callable[..., object]) -> Callable[..., object]:
    def both(*arguments: object) -> object:
        first()
        return call(*arguments)

    return both


def _read_half_written(path: Path, images: Images) -> bytes:
    """What is read while somebody has written only a part of another picture over the file."""
    content = images.content()
    part = images.random.randrange(len(content))
    try:
        with path.open("r+b") as file:
            file.write(content[:part])
            file.flush()
            data = read_frame(path)
            file.write(content[part:])
    except FileNotFoundError:
        return read_frame(path)
    return data

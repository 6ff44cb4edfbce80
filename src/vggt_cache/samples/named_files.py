"""Annotation files that were named one by one, as the trainer's `--annotation_path` and `--data_path` do."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vggt_cache.errors import DataError
from vggt_cache.samples.paths import tidy
from vggt_cache.samples.sources import Sources, find_sources


def sources_of_files(annotation_path: str, data_path: str = "") -> Sources:
    """The samples of the files in `annotation_path`, whose frames are below the folders in `data_path`.

    Both may hold several paths, with commas between; one folder serves all files. Without a folder, names
    are looked for beside their file, as for a data root that is one file. Raises DataError for files and
    folders that cannot be used.
    """
    files = [_file(given) for given in _parts(annotation_path)]
    if not files:
        raise DataError("--annotation_path names no file: give a *.jsonl or *.json with samples")
    for path in files:
        if files.count(path) > 1:
            raise DataError(
                f"--annotation_path names {path} twice, so its samples would count double: name it once"
            )
    folders = _folders(_parts(data_path), files)
    found = [find_sources(path) for path in files]
    return Sources(
        root=folders[0],
        jsonl_files=tuple(path for source in found for path in source.jsonl_files),
        json_files=tuple(path for source in found for path in source.json_files),
        folders=dict(zip(files, folders, strict=True)),
    )


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _absolute(path: str) -> str:
    return tidy(os.path.join(os.getcwd(), path))


def _file(given: str) -> str:
    path = _absolute(given)
    if os.path.isdir(path):
        raise DataError(f"--annotation_path {given} is a folder: give a folder as --train_data_root")
    if not os.path.exists(path):
        raise DataError(f"--annotation_path {given} does not exist: check the path and its mount")
    return path


def _folders(given: Sequence[str], files: Sequence[str]) -> list[str]:
    """For each file its folder."""
    if not given:
        return [os.path.dirname(path) for path in files]
    for folder in given:
        if not os.path.isdir(folder):
            raise DataError(f"--data_path {folder} is no folder that exists: name the folder of the images")
    if len(given) not in (1, len(files)):
        raise DataError(
            f"--data_path names {len(given)} folders for {len(files)} annotation files: give one for all, or one each"
        )
    folders = [_absolute(folder) for folder in given]
    return folders * len(files) if len(folders) == 1 else folders

"""Is this node ready to train? Everything is looked at that would otherwise fail minutes later, on some rank."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from vggt_cache.cluster import equipment
from vggt_cache.errors import CacheAccessError, CacheNotFoundError, DataError, NotACacheError, SettingsError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store import list_stores

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What is about to be started on this node, in the words of the launcher's variables. Empty: not given."""

    model_path: str
    vggt_model_path: str
    data_root: str
    annotation_path: str
    data_path: str
    output_dir: str
    cache_dir: str
    cache_miss: str
    ds_config: str
    """A DeepSpeed configuration, or `none`."""
    device: str
    """`cpu` or `cuda`."""
    report_to: str
    nodes: int
    processes: int
    """On each node."""
    batch_size: int
    """Samples of one process at once."""
    accumulation: int
    """Such batches in one optimizer step."""


def inspect(launch: Launch) -> list[str]:
    """What the run will do, in lines for the user. Raises SettingsError, DataError or a StoreError."""
    batch = _batch(launch)
    lines = [
        f"model: {_model(launch.model_path)}",
        f"data: {_data(launch)}",
        f"features: {_features(launch)}",
        f"processes: {launch.nodes} x {launch.processes} on {launch.device}, {equipment.engine(launch.ds_config)}",
        batch,
        f"output: {equipment.output(launch.output_dir)}",
    ]
    equipment.check_packages(ds_config=launch.ds_config, device=launch.device, report_to=launch.report_to)
    return lines


def _batch(launch: Launch) -> str:
    for name, value in (
        ("NPROC_PER_NODE", launch.processes),
        ("PER_DEVICE_BATCH_SIZE", launch.batch_size),
        ("GRAD_ACCUM_STEPS", launch.accumulation),
    ):
        if value < 1:
            raise SettingsError(f"{name} is {value}, so nothing would be trained: give 1 or more")
    processes = launch.nodes * launch.processes
    samples = processes * launch.batch_size * launch.accumulation
    return (
        f"batch: {samples} samples an optimizer step "
        f"({processes} processes x {launch.batch_size} x {launch.accumulation} accumulated)"
    )


# ---------------------------------------------------------------- models


def _model(path: str) -> str:
    if not path:
        raise SettingsError(
            "MODEL_PATH is empty, so there is nothing to train: set it to the directory of Qwen2.5-VL"
        )
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise SettingsError(
                f"MODEL_PATH {path} has no config.json, so it holds no model: give the directory of "
                "Qwen2.5-VL itself"
            )
        return path
    if not HUB_ID.fullmatch(path):
        raise SettingsError(
            f"MODEL_PATH {path} does not exist on this machine, so there is nothing to train: give the "
            "directory of Qwen2.5-VL, or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return f"{path} (no directory here, so it is taken for a hub id)"


def _encoder_is_here(path: str) -> bool:
    return bool(path) and (Path(path).exists() or HUB_ID.fullmatch(path) is not None)


# ---------------------------------------------------------------- data


def _data(launch: Launch) -> str:
    if bool(launch.data_root) == bool(launch.annotation_path):
        given = "both DATA_ROOT and" if launch.data_root else "neither DATA_ROOT nor"
        raise SettingsError(
            f"{given} ANNOTATION_PATH {'are' if launch.data_root else 'is'} set, so it is not clear what to train on: "
            "set DATA_ROOT to the folder of annotations or episodes, or ANNOTATION_PATH (and DATA_PATH) instead"
        )
    if launch.data_root:
        _require_folder("DATA_ROOT", launch.data_root)
        return launch.data_root
    files = [name for name in launch.annotation_path.split(",") if name]
    for name in files:
        if not os.access(name, os.R_OK) or not Path(name).is_file():
            raise DataError(
                f"ANNOTATION_PATH names {name}, which is no file that you can read on this machine: correct "
                "the path, or ask for read access"
            )
    if launch.data_path:
        _require_folder("DATA_PATH", launch.data_path)
    return ", ".join(files)


def _require_folder(variable: str, path: str) -> None:
    try:
        with os.scandir(path) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        raise DataError(
            f"{variable} {path} cannot be read on this machine ({error.strerror}), so there is nothing to "
            "train on: correct the path, or check the mount and its rights"
        ) from error
    if empty:
        raise DataError(
            f"{variable} {path} is empty, so there is nothing to train on: is the file system mounted?"
        )


# ---------------------------------------------------------------- features


def _features(launch: Launch) -> str:
    if not launch.cache_dir:
        if not _encoder_is_here(launch.vggt_model_path):
            raise SettingsError(
                f"VGGT_CACHE_DIR is not set and VGGT_MODEL_PATH '{launch.vggt_model_path}' does not exist, so "
                "there are no features to train on: set VGGT_CACHE_DIR to a cache, or VGGT_MODEL_PATH to "
                "VGGT-1B"
            )
        return f"computed live by {launch.vggt_model_path} in every step (VGGT_CACHE_DIR is not set)"
    may_be_empty = launch.cache_miss == "fill"
    try:
        specs = list_stores(launch.cache_dir)
    except CacheNotFoundError:
        specs = []
        if not may_be_empty:
            raise
    if not specs and not may_be_empty:
        raise NotACacheError(
            f"VGGT_CACHE_DIR {launch.cache_dir} holds no feature cache: give the --cache_dir of the "
            "precompute command, or set VGGT_CACHE_MISS=fill to fill it while training"
        )
    stores = [f"context {spec.context}, {_shards(launch.cache_dir, spec)} shards" for spec in specs]
    return f"cache {launch.cache_dir} ({' | '.join(stores) or 'empty'}); {_missing(launch)}"


def _shards(cache_dir: str, spec: FeatureSpec) -> int:
    """How many there are. One is opened: a folder that can be listed may hold files that cannot be read."""
    folder = Path(cache_dir) / spec.short_name / "shards"
    try:
        names = sorted(os.listdir(folder)) if folder.exists() else []
        if names:
            (folder / names[0]).open("rb").close()
    except OSError as error:
        raise CacheAccessError(
            f"VGGT_CACHE_DIR {cache_dir} cannot be read ({error.strerror}: {error.filename}), so training "
            f"would find no feature: let its owner run chmod -R 755 {cache_dir}"
        ) from error
    return len(names)


def _missing(launch: Launch) -> str:
    """What becomes of features that the cache has not."""
    if launch.cache_miss == "error":
        return "a missing feature ends the run"
    put_back = " and put into the cache" if launch.cache_miss == "fill" else ""
    if _encoder_is_here(launch.vggt_model_path):
        return f"missing ones are computed{put_back}"
    return (
        f"there is no VGGT at '{launch.vggt_model_path}': that is no fault as long as no feature is missing"
    )

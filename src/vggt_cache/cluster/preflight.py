"""Is this node ready to train? Everything is looked at that would otherwise fail minutes later, on some
rank."""

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
class Plan:
    """What is about to be started on this node, in the words of the launcher's variables. Empty: not
    given."""

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


def inspect(plan: Plan) -> list[str]:
    """What the run will do, in lines for the user. Raises SettingsError, DataError or a StoreError."""
    _check_numbers(plan)
    lines = [
        f"model: {_model(plan.model_path)}",
        f"data: {_data(plan)}",
        f"features: {_features(plan)}",
        f"processes: {plan.nodes} x {plan.processes} on {plan.device}, {equipment.engine(plan.ds_config)}",
        _batch(plan),
        f"output: {equipment.output(plan.output_dir)}",
    ]
    equipment.check_packages(ds_config=plan.ds_config, device=plan.device, report_to=plan.report_to)
    return lines


def _check_numbers(plan: Plan) -> None:
    numbers = {
        "NPROC_PER_NODE": plan.processes,
        "PER_DEVICE_BATCH_SIZE": plan.batch_size,
        "GRAD_ACCUM_STEPS": plan.accumulation,
    }
    for name, value in numbers.items():
        if value < 1:
            raise SettingsError(f"{name} is {value}, so nothing would be trained: give 1 or more")


def _batch(plan: Plan) -> str:
    processes = plan.nodes * plan.processes
    samples = processes * plan.batch_size * plan.accumulation
    return (
        f"batch: {samples} samples an optimizer step "
        f"({processes} processes x {plan.batch_size} x {plan.accumulation} accumulated)"
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


def _data(plan: Plan) -> str:
    if bool(plan.data_root) == bool(plan.annotation_path):
        given = (
            "both DATA_ROOT and ANNOTATION_PATH are"
            if plan.data_root
            else "neither DATA_ROOT nor ANNOTATION_PATH is"
        )
        raise SettingsError(
            f"{given} set, so it is not clear what to train on: set DATA_ROOT to the folder of annotations "
            "or episodes, or ANNOTATION_PATH (and DATA_PATH) instead"
        )
    if plan.data_root:
        _require_folder("DATA_ROOT", plan.data_root)
        return plan.data_root
    files = [name for name in plan.annotation_path.split(",") if name]
    for name in files:
        if not os.access(name, os.R_OK) or not Path(name).is_file():
            raise DataError(
                f"ANNOTATION_PATH names {name}, which is no file that you can read on this machine: correct "
                "the path, or ask for read access"
            )
    if plan.data_path:
        _require_folder("DATA_PATH", plan.data_path)
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


def _features(plan: Plan) -> str:
    if not plan.cache_dir:
        if not _encoder_is_here(plan.vggt_model_path):
            raise SettingsError(
                f"VGGT_CACHE_DIR is not set and VGGT_MODEL_PATH '{plan.vggt_model_path}' does not exist, so "
                "there are no features to train on: set VGGT_CACHE_DIR to a cache, or VGGT_MODEL_PATH to "
                "VGGT-1B"
            )
        return f"computed live by {plan.vggt_model_path} in every step (VGGT_CACHE_DIR is not set)"
    try:
        specs = list_stores(plan.cache_dir)
    except CacheNotFoundError:
        specs = []
        if plan.cache_miss != "fill":
            raise
    if not specs and plan.cache_miss != "fill":
        raise NotACacheError(
            f"VGGT_CACHE_DIR {plan.cache_dir} holds no feature cache: give the --cache_dir of the "
            "precompute command, or set VGGT_CACHE_MISS=fill to fill it while training"
        )
    return "; ".join([_stores(plan.cache_dir, specs), _missing(plan)])


def _stores(cache_dir: str, specs: list[FeatureSpec]) -> str:
    stores = [f"context {spec.context}, {_shards(cache_dir, spec)} shards" for spec in specs]
    return f"cache {cache_dir} ({' | '.join(stores) or 'empty'})"


def _shards(cache_dir: str, spec: FeatureSpec) -> int:
    """How many there are. One is opened, because a folder that can be listed may hold files that cannot
    be read."""
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


def _missing(plan: Plan) -> str:
    """What becomes of features that the cache has not."""
    if plan.cache_miss == "error":
        return "a missing feature ends the run"
    put_back = " and put into the cache" if plan.cache_miss == "fill" else ""
    if _encoder_is_here(plan.vggt_model_path):
        return f"missing ones are computed{put_back}"
    return f"there is no VGGT at '{plan.vggt_model_path}': that is no fault as long as no feature is missing"

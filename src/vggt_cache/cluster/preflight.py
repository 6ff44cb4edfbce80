"""Is this node ready to train? Everything is looked at that would otherwise fail minutes later, on some rank."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vggt_cache.cluster.known_names import check_names
from vggt_cache.errors import (
    CacheAccessError,
    CacheNotFoundError,
    DataError,
    NotACacheError,
    SettingsError,
    os_errors_as,
)
from vggt_cache.identity import FeatureSpec
from vggt_cache.place import is_url
from vggt_cache.requirements import TRAINER, fault_of
from vggt_cache.store import list_stores
from vggt_cache.store.object_store import system_of
from vggt_cache.store.shards import ShardFolder
from vggt_cache.store.staged import Staging

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
    stage: str
    stage_limit: str
    ds_config: str
    """A DeepSpeed configuration, or `none`."""
    device: str
    """`cpu` or `cuda`."""
    report_to: str
    optim: str
    lr_scheduler_type: str
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
        f"processes: {launch.nodes} x {launch.processes} on {launch.device}, {_engine(launch.ds_config)}",
        batch,
        f"output: {_output(launch.output_dir)}",
    ]
    _check_packages(launch)
    check_names(optim=launch.optim, lr_scheduler_type=launch.lr_scheduler_type, report_to=launch.report_to)
    return lines


def _batch(launch: Launch) -> str:
    each, batch, times = launch.processes, launch.batch_size, launch.accumulation
    names = ("NPROC_PER_NODE", "PER_DEVICE_BATCH_SIZE", "GRAD_ACCUM_STEPS")
    for name, value in zip(names, (each, batch, times), strict=True):
        if value < 1:
            raise SettingsError(f"{name} is {value}, so nothing would be trained: give 1 or more")
    terms = f"{launch.nodes * each} processes x {batch} x {times} accumulated"
    return f"batch: {launch.nodes * each * batch * times} samples an optimizer step ({terms})"


def _model(path: str) -> str:
    if not path:
        fault = "is empty, so there is nothing to train: set it to the directory of Qwen2.5-VL"
    elif (Path(path) / "config.json").is_file():
        return path
    elif Path(path).is_dir():
        fault = f"{path} has no config.json, so it holds no model: give the directory of Qwen2.5-VL itself"
    elif HUB_ID.fullmatch(path):
        return f"{path} (no directory here, so it is taken for a hub id)"
    else:
        fault = (
            f"{path} does not exist on this machine, so there is nothing to train: give the directory of Qwen2.5-VL, "
            "or a hub id such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    raise SettingsError(f"MODEL_PATH {fault}")


def _data(launch: Launch) -> str:
    if bool(launch.data_root) == bool(launch.annotation_path):
        both, neither = "both DATA_ROOT and ANNOTATION_PATH are", "neither DATA_ROOT nor ANNOTATION_PATH is"
        raise SettingsError(
            f"{both if launch.data_root else neither} set, so it is not clear what to train on: set DATA_ROOT to the "
            "folder of annotations or episodes, or ANNOTATION_PATH (and DATA_PATH) instead"
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
    nothing = "so there is nothing to train on"
    remedy = f", {nothing}: correct the path, or check the mount and its rights"
    fault = f"{variable} {path} cannot be read on this machine"
    with os_errors_as(DataError, fault, remedy), os.scandir(path) as entries:
        if next(entries, None) is None:
            raise DataError(f"{variable} {path} is empty, {nothing}: is the file system mounted?")


def _features(launch: Launch) -> str:
    encoder = launch.vggt_model_path
    has_encoder = os.path.exists(encoder) or HUB_ID.fullmatch(encoder) is not None
    if not launch.cache_dir:
        if not has_encoder:
            raise SettingsError(
                f"VGGT_CACHE_DIR is not set and VGGT_MODEL_PATH '{encoder}' does not exist, so there are no features "
                "to train on: set VGGT_CACHE_DIR to a cache, or VGGT_MODEL_PATH to VGGT-1B"
            )
        return f"computed live by {encoder} in every step (VGGT_CACHE_DIR is not set)"
    if launch.stage:
        Staging(local_dir=launch.stage, limit=launch.stage_limit or None)
    if launch.cache_miss == "error":
        missing = "a missing feature ends the run"
    elif has_encoder:
        missing = "missing ones are computed" + " and put into the cache" * (launch.cache_miss == "fill")
    else:
        missing = f"there is no VGGT at '{encoder}': that is no fault as long as no feature is missing"
    return f"cache {launch.cache_dir} ({' | '.join(_stores(launch)) or 'empty'}); {missing}"


def _stores(launch: Launch) -> list[str]:
    may_be_empty = launch.cache_miss == "fill"
    try:
        specs = list_stores(launch.cache_dir)
    except CacheNotFoundError:
        if not may_be_empty:
            raise
        specs = []
    if not specs and not may_be_empty:
        raise NotACacheError(
            f"VGGT_CACHE_DIR {launch.cache_dir} holds no feature cache: give the --cache_dir of the precompute "
            "command, or set VGGT_CACHE_MISS=fill to fill it while training"
        )
    return [f"context {spec.context}, {_shards(launch.cache_dir, spec)} shards" for spec in specs]


def _shards(cache_dir: str, spec: FeatureSpec) -> int:
    """How many there are. One is opened: a folder that can be listed may hold files that cannot be read."""
    if is_url(cache_dir):
        store_dir = os.path.join(cache_dir, spec.short_name)
        with closing(ShardFolder(store_dir, spec, fs=system_of(cache_dir))) as shards:
            return len(shards.names())
    folder = Path(cache_dir) / spec.short_name / "shards"
    try:
        names = sorted(os.listdir(folder)) if folder.exists() else []
        for name in names[:1]:
            (folder / name).open("rb").close()
    except OSError as error:
        raise CacheAccessError(
            f"VGGT_CACHE_DIR {cache_dir} cannot be read ({error.strerror}: {error.filename}), so training would "
            f"find no feature: let its owner run chmod -R 755 {cache_dir}"
        ) from error
    return len(names)


def _engine(ds_config: str) -> str:
    if ds_config == "none":
        return "no DeepSpeed"
    remedy = ": give one of scripts/zero3.json, scripts/zero2.json and scripts/zero2_offload.json, or none"
    try:
        with os_errors_as(SettingsError, f"DS_CONFIG {ds_config} cannot be read", remedy):
            stage = json.loads(Path(ds_config).read_text(encoding="utf-8"))["zero_optimization"]["stage"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"DS_CONFIG {ds_config} is no DeepSpeed configuration ({type(error).__name__}: {error}): it must be "
            "JSON and say zero_optimization.stage; compare it with scripts/zero3.json"
        ) from error
    return f"DeepSpeed ZeRO-{stage} ({ds_config})"


def _output(path: str) -> str:
    """The directory, and the checkpoint in it to go on from."""
    remedy = ", so no checkpoint could be saved: set OUTPUT_DIR to a directory that you can write"
    with os_errors_as(SettingsError, f"OUTPUT_DIR {path} cannot be written", remedy):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    steps = [int(name[11:]) for name in os.listdir(path) if re.fullmatch(r"checkpoint-\d+", name)]
    return f"{path}, going on from checkpoint-{max(steps)}" if steps else path


def _check_packages(launch: Launch) -> None:
    wanted = list(TRAINER)
    wanted += [] if launch.ds_config == "none" else ["deepspeed"]
    wanted += ["tensorboard"] if launch.report_to in ("tensorboard", "all") else []
    if fault := fault_of(wanted):
        raise SettingsError(fault)
    if launch.device == "cuda" and version("torch").endswith("+cpu"):
        raise SettingsError(
            f"torch {version('torch')} of {sys.executable} is a build without CUDA, so it would not see the GPUs: "
            "install a build with CUDA, or set PYTHON to another interpreter"
        )

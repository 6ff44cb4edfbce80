"""What a node trains with: DeepSpeed's configuration, the output directory, installed packages."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from vggt_cache.errors import SettingsError

NO_CONFIG = "none"


def engine(ds_config: str) -> str:
    """What DeepSpeed will do. Raises SettingsError for a configuration that it cannot use."""
    if ds_config == NO_CONFIG:
        return "no DeepSpeed"
    try:
        config = json.loads(Path(ds_config).read_text(encoding="utf-8"))
        stage = config["zero_optimization"]["stage"]
    except OSError as error:
        raise SettingsError(
            f"DS_CONFIG {ds_config} cannot be read ({error.strerror}): give one of scripts/zero3.json, "
            "scripts/zero2.json and scripts/zero2_offload.json, or none"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f"DS_CONFIG {ds_config} is no DeepSpeed configuration ({type(error).__name__}: {error}): "
            "it must be JSON and say zero_optimization.stage; compare it with scripts/zero3.json"
        ) from error
    return f"DeepSpeed ZeRO-{stage} ({ds_config})"


def output(path: str) -> str:
    """The directory, and the checkpoint in it to go on from. Raises SettingsError where nothing can be written."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise SettingsError(
            f"OUTPUT_DIR {path} cannot be written ({error.strerror}), so no checkpoint could be saved: set "
            "OUTPUT_DIR to a directory that you can write"
        ) from error
    checkpoints = [name for name in os.listdir(path) if re.fullmatch(r"checkpoint-\d+", name)]
    if not checkpoints:
        return path
    return f"{path}, going on from {max(checkpoints, key=lambda name: int(name.split('-')[1]))}"


def check_packages(*, ds_config: str, device: str, report_to: str) -> None:
    """Raises SettingsError for a package that is missing, or a torch that would not see the GPUs."""
    wanted = ["torch", "transformers", "accelerate"]
    wanted += [] if ds_config == NO_CONFIG else ["deepspeed"]
    wanted += ["tensorboard"] if report_to in ("tensorboard", "all") else []
    for name in wanted:
        if importlib.util.find_spec(name) is None:
            raise SettingsError(
                f"the package {name} is not installed for {sys.executable}, and training needs it: run "
                f"{sys.executable} -m pip install '.[train]' in the project, or set PYTHON to another "
                "interpreter"
            )
    if device == "cuda" and version("torch").endswith("+cpu"):
        raise SettingsError(
            f"torch {version('torch')} of {sys.executable} is a build without CUDA, so it would not see the "
            "GPUs: install a build with CUDA, or set PYTHON to another interpreter"
        )

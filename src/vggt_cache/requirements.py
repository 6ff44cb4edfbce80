"""Which packages must be there, and how new: looked at by name before anything imports them.

Commands call `require` first, so this imports nothing but the standard library. tests/test_requirements.py compares
the versions with pyproject.toml.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

LOWEST_PYTHON = (3, 10)
LOWEST = {
    "torch": "2.5",
    "safetensors": "0.4.3",
    "numpy": "1.26",
    "Pillow": "10.3",
    "tqdm": "4.66",
    "xxhash": "3.4",
    "huggingface_hub": "0.23",
    "rich": "13",
    "transformers": "5.17",
    "accelerate": "1.3",
    "deepspeed": "0.15",
    "tensorboard": "2.17",
    "ray": "2.55",
}
MONITOR = ("tqdm", "rich")
CACHE = (*MONITOR, "torch", "safetensors", "numpy", "Pillow", "xxhash", "huggingface_hub")
TRAINER = (*CACHE, "transformers", "accelerate")
_IMPORTED_AS = {"Pillow": "PIL"}


def fault_of(names: Iterable[str]) -> str:
    """What is missing or too old for this interpreter, and what to do, in one sentence; empty where nothing is."""
    if sys.version_info < LOWEST_PYTHON:
        needed = ".".join(map(str, LOWEST_PYTHON))
        return (
            f"{sys.executable} is Python {sys.version.split()[0]}, and {needed} or newer is needed: start with another "
            "interpreter, for scripts by setting PYTHON"
        )
    found = {name: _version(name) for name in names}
    wrong = {
        name: "is not installed" if has is None else f"is {has}, and {LOWEST[name]} or newer is needed"
        for name, has in found.items()
        if has is None or (has and _numbers(has) < _numbers(LOWEST[name]))
    }
    if not wrong:
        return ""
    packages = shlex.join(f"{name}>={LOWEST[name]}" for name in wrong)
    return (
        f"{', '.join(f'{name} {what}' for name, what in wrong.items())}, for {sys.executable}: run {sys.executable} -m "
        f"pip install {packages}, or start with another interpreter, for scripts by setting PYTHON"
    )


def require(names: Iterable[str]) -> None:
    """End the process with one sentence and exit code 2 where one is missing or too old."""
    if fault := fault_of(names):
        print(f"[ERROR] {fault}", file=sys.stderr)
        sys.exit(2)


def _version(name: str) -> str | None:
    """Empty where it is there and does not tell; None where it is not."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None if importlib.util.find_spec(_IMPORTED_AS.get(name, name)) is None else ""


def _numbers(version: str) -> list[int]:
    """`2.13.0+cpu` as [2, 13, 0]"""
    return [int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0])]

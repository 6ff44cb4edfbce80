"""The lowest versions that pyproject.toml declares are ones that the project runs with. Installs gigabytes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("reads pyproject.toml with tomllib, of Python 3.11", allow_module_level=True)

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


def lowest(*requirements: str) -> list[str]:
    """`name>=version` as `name==version`."""
    found = [re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements]
    assert all(found), requirements
    return [f"{match[1]}=={match[2]}" for match in found if match]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare environment's interpreter."""
    directory = tmp_path_factory.mktemp("lowest") / "venv"
    venv.create(directory, with_pip=True)
    return directory / "bin" / "python"


def install(python: Path, *what: str) -> None:
    command = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *what]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]


def import_everything(python: Path, *packages: str) -> None:
    found = subprocess.run(
        [python, "-c", IMPORT_EVERYTHING, *packages], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_imports_and_trains_with_the_lowest_declared_versions(python: Path) -> None:
    """First what precompute needs alone; transformers then asks for newer versions of some of it.

    Not DeepSpeed, which is compiled at its installation.
    """
    install(python, *lowest(*PROJECT["dependencies"]))
    import_everything(python, "vggt_cache")
    extras = PROJECT["optional-dependencies"]
    training = [name for name in (*extras["train"], *extras["lora"]) if "deepspeed" not in name]
    torch = [name for name in PROJECT["dependencies"] if name.startswith("torch>=")]
    install(python, *lowest(*torch, *training), "pytest", "psutil", "hypothesis")
    import_everything(python, "vggt_cache", "janusvln")
    run = [
        python,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "tests/test_train_run.py",
        "tests/test_train_lora.py",
        "-k",
        "features_matter or the_merged_model",
    ]
    found = subprocess.run(
        run, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "src"}
    )
    assert found.returncode == 0, found.stdout[-3000:]

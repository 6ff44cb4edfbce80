"""What an installation puts beside other people's packages: ours, and nothing that hides theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"vggt_cache", "janusvln"}
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE")
WHERE = "import importlib.util as u; print([u.find_spec(n).origin for n in ('qwen_vl', 'vggt_cache', 'janusvln')])"


def test_two_top_level_packages_are_found() -> None:
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_namespace_packages(str(ROOT / "src"))
    assert {name.split(".")[0] for name in found if not name.endswith(".egg-info")} == OURS


@pytest.mark.slow
def test_beside_the_installed_wheel_somebody_elses_qwen_vl_is_theirs(tmp_path: Path) -> None:
    """The package that builds wheels is downloaded."""
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(_wheel(tmp_path)) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
        wheel.extractall(site)
    assert {name.split("/")[0] for name in names} == OURS
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    assert set(names) == modules | {"vggt_cache/py.typed"}
    theirs = tmp_path / "theirs" / "src" / "qwen_vl" / "__init__.py"
    theirs.parent.mkdir(parents=True)
    theirs.touch()
    environment = {**os.environ, "PYTHONPATH": f"{theirs.parent.parent}:{site}"}
    shown = subprocess.run(
        [sys.executable, "-S", "-c", WHERE], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        shown.stdout
        == f"{[str(theirs), *(str(site / name / '__init__.py') for name in sorted(OURS)[::-1])]}\n"
    )


def _wheel(folder: Path) -> Path:
    source = folder / "source"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)], check=True
    )
    return next(folder.glob("*.whl"))

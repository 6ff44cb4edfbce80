"""Packages that are missing or too old are one sentence with the command that installs them, from every command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vggt_cache.requirements import CACHE, LOWEST, LOWEST_PYTHON, TRAINER, fault_of

ROOT = Path(__file__).resolve().parent.parent

# Read by Python when it starts: the packages named in PRETEND have these versions, or are not there.
SITE = """
import importlib.metadata, importlib.util, os, sys
pretended = dict(one.split("=") for one in os.environ["PRETEND"].split(","))
true = importlib.metadata.version
def version(name):
    found = pretended.get(name) or (true(name) if name not in pretended else None)
    if found is None:
        raise importlib.metadata.PackageNotFoundError(name)
    return found
importlib.metadata.version = version
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if pretended.get(name) == "" else found(name, package)
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if pretended.get(name) == "":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    def invalidate_caches(self): pass
sys.meta_path.insert(0, Hidden())
"""


def run(folder: Path, pretend: str, *command: str) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(SITE)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT / 'src'}",
        "PRETEND": pretend,
        "PYTHON": sys.executable,
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


PRECOMPUTE = (sys.executable, str(ROOT / "scripts" / "precompute_vggt_features.py"), "--help")
MONITOR = ("bash", str(ROOT / "scripts" / "monitor_training.sh"), "x.log")


@pytest.mark.parametrize(
    ("command", "package"),
    [
        (PRECOMPUTE, "tqdm"),
        (PRECOMPUTE, "torch"),
        (MONITOR, "tqdm"),
        (MONITOR, "rich"),
        ((sys.executable, "-m", "vggt_cache", "info", "x"), "xxhash"),
        ((sys.executable, "-m", "janusvln.train"), "transformers"),
        ((sys.executable, "-m", "janusvln.train", "--deepspeed", "x"), "deepspeed"),
        *(((sys.executable, "-m", f"janusvln.{name}"), "accelerate") for name in ("demo", "export", "serve")),
    ],
)
def test_a_missing_package_is_one_sentence_with_the_command_that_installs_it(
    tmp_path: Path, command: tuple[str, ...], package: str
) -> None:
    done = run(tmp_path, f"{package}=", *command)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"[ERROR] {package} is not installed, for {sys.executable}: run {sys.executable} -m pip install "
        f"'{package}>={LOWEST[package]}', or start with another interpreter, for scripts by setting PYTHON\n"
    )


def test_what_is_too_old_is_told_beside_what_is_missing(tmp_path: Path) -> None:
    done = run(tmp_path, "transformers=4.50.0,accelerate=", sys.executable, "-m", "janusvln.train")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "transformers is 4.50.0, and 5.17 or newer is needed, accelerate is not installed, for " in line
    assert "pip install 'transformers>=5.17' 'accelerate>=1.3'" in line


def test_the_monitor_needs_little(tmp_path: Path) -> None:
    done = run(tmp_path, "torch=,numpy=", *MONITOR, "--once")
    assert done.stderr.startswith("[ERROR] no log matches x.log")


def test_an_old_interpreter_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "and 3.10 or newer is needed" in fault_of([])


def test_nothing_is_wrong_here() -> None:
    assert fault_of(TRAINER) == ""


def test_the_versions_are_those_of_the_project_file() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    declared = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)"', text, re.MULTILINE))
    assert {name: declared[name] for name in LOWEST} == LOWEST
    assert set(CACHE) == set(re.findall(r'"(\w+)>=', text.split("dependencies = [")[1].split("]")[0]))
    assert f'requires-python = ">={".".join(map(str, LOWEST_PYTHON))}"' in text

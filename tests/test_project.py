"""The project as a whole: what its code may import and call, what its files may name, and its Makefile."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for folder in ("src", "scripts", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
TEXT_SUFFIXES = {".py", ".md", ".toml", ".sh", ".txt", ".yml", ".yaml", ".cfg", ""}
FOLDERS = ("src", "scripts", "benchmarks", "docs", "tests", ".ci")


def project_texts() -> Iterator[tuple[str, str]]:
    """Name and text of every file of ours that holds text, this one left out."""
    # In a worktree .git is a file, and names the place of the repository.
    files = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in files:
        hidden = {"__pycache__", "assets"} & set(path.parts) or ".egg-info" in str(path)
        if path.suffix in TEXT_SUFFIXES and not hidden and path != Path(__file__).resolve():
            yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8", errors="replace")


def imported_modules(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def roots(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


# ---------------------------------------------------------------- what the code may do

UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "np.load", "numpy.load", "yaml.load", "os.system", "__import__"}


def unsafe(source: str) -> list[str]:
    tree = ast.parse(source)
    found = [f"import {name}" for name in sorted(roots(imported_modules(tree)) & UNSAFE_IMPORTS)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg for keyword in node.keywords}
            if name in UNSAFE_CALLS or "allow_pickle" in keywords or "shell" in keywords:
                found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import torch\ntorch.load(f)", "eval(text)", "exec(text)",
        "np.load(f)", "x.load(f, allow_pickle=True)", "yaml.load(f)", "run(command, shell=True)", "os.system(c)",
    ],
)  # fmt: skip
def test_the_check_for_unsafe_code_sees_it(source: str) -> None:
    assert unsafe(source)


PEERS = ROOT / "benchmarks" / "peers"
"""What others do, for comparison, on files that were written a moment before."""
WEIGHTS_ALONE = ROOT / "src" / "vggt_cache" / "encoder" / "pickled.py"
"""Converts a pickle that a user names; `test_security.py` holds it to the one call, with `weights_only=True`."""


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    ours = [path for path in SOURCES if PEERS not in path.parents and path != WEIGHTS_ALONE]
    assert {str(path): unsafe(path.read_text()) for path in ours if unsafe(path.read_text())} == {}


def test_the_cache_never_imports_transformers_nor_the_trainer() -> None:
    for path in (ROOT / "src" / "vggt_cache").rglob("*.py"):
        forbidden = roots(imported_modules(ast.parse(path.read_text()))) & {
            "transformers",
            "janusvln",
            "deepspeed",
        }
        assert not forbidden, (path, forbidden)


LOW = {
    *(
        "errors",
        "context",
        "environment",
        "identity",
        "frames",
        "mistaken_frames",
        "flags",
        "small_files",
        "output",
        "call_spec",
        "place",
    ),
}
"""Modules at the bottom: nothing above is imported by them."""


def test_imports_point_one_way() -> None:
    below = {
        **{name: {"errors", "identity"} for name in LOW},
        "frames": {"errors", "identity", "mistaken_frames"},
        "errors": set(),
        "context": set(),
        "identity": {"context", "errors"},
        "pixels": {"errors", "identity", "frames"},
        "samples": LOW,
        "codec": LOW,
        "encoder": LOW,
        "store": LOW | {"codec", "pixels"},
        "doctor": LOW | {"store", "precompute"},  # it lets both do their work on the mount
    }
    for path in (ROOT / "src" / "vggt_cache").rglob("*.py"):
        own = path.relative_to(ROOT / "src" / "vggt_cache").parts[0].removesuffix(".py")
        if own not in below:
            continue
        modules = imported_modules(ast.parse(path.read_text()))
        used = {name.split(".")[1] for name in modules if name.startswith("vggt_cache.")}
        assert used <= below[own] | {own}, (path, used)


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh process has loaded after the statement."""
    code = f"{statement}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "module", ["frames", "identity", "errors", "codec", "samples", "cli", "doctor", "demo"]
)
def test_light_modules_do_not_load_torch(module: str) -> None:
    home = ROOT / "src" / "vggt_cache" / module
    if not home.with_suffix(".py").exists() and not (home / "__init__.py").exists():
        pytest.skip(f"there is no vggt_cache.{module} yet")
    assert not loaded_after(f"import vggt_cache.{module}") & {"torch", "transformers", "huggingface_hub"}


def test_help_of_the_command_line_needs_no_torch() -> None:
    assert "torch" not in loaded_after(
        "from vggt_cache.cli import build_parser\n"
        "import contextlib, io\n"
        "with contextlib.redirect_stdout(io.StringIO()): build_parser().print_help()"
    )


# ---------------------------------------------------------------- what its files may name

REGISTRIES = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.org|index-url[ =]+https?:"
)
MACHINE_PATHS = re.compile(r"(?<![\w./-])/(?:work|root|opt|Users)/|(?<![\w./-])/home/(?!user|me|you)")


def test_no_file_names_a_registry_host() -> None:
    assert [name for name, text in project_texts() if REGISTRIES.search(text)] == []


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {name: match[0] for name, text in project_texts() if (match := MACHINE_PATHS.search(text))}
    assert found == {}


def test_no_large_or_binary_file_lies_in_the_project_root() -> None:
    allowed = {".py", ".md", ".toml", ".cfg", ".lock", ".png", ""}
    strange = [p.name for p in ROOT.iterdir() if p.is_file() and p.suffix not in allowed and p.name[0] != "."]
    assert strange == []


def test_the_licence_is_apache_2_unchanged() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text()


def test_scripts_for_the_shell_are_executable_and_parse() -> None:
    for path in (*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"):
        assert os.access(path, os.X_OK), path
        assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0, path


# ---------------------------------------------------------------- the Makefile

TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

# Stands for Python: makes a .venv whose python, ruff, mypy and vggt-cache only write down how they are called.
FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" | sed 's,.*/bin/,,' >> calls
case "$*" in
  *version_info*) exit ${OLD:-0};;
  *ensurepip*) exit ${NO_VENV:-0};;
  "-m venv .venv") mkdir -p .venv/bin; for n in python ruff mypy vggt-cache; do cp "$SELF" .venv/bin/$n; done;;
  *+cpu*) exit ${NO_CPU_WHEEL:-0};;
esac
"""


class Made:
    """Runs make in a copy of the Makefile, in a directory whose name has a blank, with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "a project"
        self.folder.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.folder / name)
        (self.folder / "tool" / "bin").mkdir(parents=True)
        self.python = self.folder / "tool" / "bin" / "python3"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        kept = {
            k: v for k, v in os.environ.items() if k not in ("TORCH", "PIP_ARGS", "MAKEFLAGS", "MAKELEVEL")
        }
        return subprocess.run(
            ["make", "PYTHON=tool/bin/python3", *arguments], cwd=self.folder, capture_output=True, text=True,
            env={**kept, "SELF": str(self.python), **environment},
        )  # fmt: skip

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


@needs_make
def test_make_test_sets_up_and_runs_every_check(made: Made) -> None:
    run = made.run("test")
    assert run.returncode == 0, run.stderr
    calls = made.calls()
    order = [
        "-m venv .venv",
        "install",
        "--editable .[dev,train]",
        "ruff check",
        "ruff format --check",
        "mypy",
        "-m pytest",
    ]
    places = [next(i for i, call in enumerate(calls) if part in call) for part in order]
    assert places == sorted(places)


@needs_make
def test_a_second_call_installs_nothing_and_a_changed_pyproject_installs_without_a_new_venv(
    made: Made,
) -> None:
    assert made.run("demo").returncode == 0
    demo = ["vggt-cache demo demo", "python -m janusvln.demo demo"]
    assert made.calls()[-2:] == demo
    assert made.run("demo").returncode == 0
    assert made.calls() == demo
    pyproject = made.folder / "pyproject.toml"
    later = (made.folder / ".venv" / ".ready").stat().st_mtime + 10
    os.utime(pyproject, (later, later))
    assert made.run("demo").returncode == 0
    again = made.calls()
    assert any("--editable" in call for call in again)
    assert not any("venv .venv" in call for call in again)


@needs_make
def test_many_jobs_at_once_set_up_once(made: Made) -> None:
    assert made.run("-j8", "test", "demo").returncode == 0
    calls = made.calls()
    assert sum("-m venv .venv" in call for call in calls) == 1
    assert sum("--editable" in call for call in calls) == 1


@needs_make
def test_torch_is_pinned_and_settings_reach_pip(made: Made) -> None:
    assert made.run("lint", "PIP_ARGS=--no-index", NO_CPU_WHEEL="1").returncode == 0
    installs = [call for call in made.calls() if " install " in call]
    assert all("--no-index" in call for call in installs)
    assert any(call.endswith("torch==2.13.0") for call in installs)
    (made.folder / ".venv" / ".torch").unlink()
    assert made.run("lint", "TORCH=torch==2.4.0").returncode == 0
    assert all("torch==2.4.0" in call for call in made.calls() if " install " in call)


@needs_make
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("OLD", "is no Python of 3.10 or newer"),
        ("NO_VENV", "cannot make virtual environments, because ensurepip"),
    ],
)
def test_an_unfit_python_is_one_clear_sentence(fault: str, sentence: str, made: Made) -> None:
    run = made.run("test", **{fault: "1"})
    assert run.returncode != 0
    errors = [line for line in run.stderr.splitlines() if line.startswith("[ERROR]")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not (made.folder / ".venv").exists()


@needs_make
def test_make_alone_lists_the_targets(made: Made) -> None:
    listed = set(re.findall(r"^  make ([a-z-]+)", made.run().stdout, re.MULTILINE))
    assert {"demo", "test", "test-slow", "lint", "format", "bench", "clean", "help"} <= listed <= TARGETS


def test_every_make_target_that_a_document_names_exists() -> None:
    for name, text in project_texts():
        if name.endswith(".md"):
            named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE))
            assert named <= TARGETS, (name, named - TARGETS)


def test_continuous_integration_runs_the_test_command() -> None:
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_every_benchmark_and_every_document_is_named_where_a_reader_looks_for_it() -> None:
    table = (ROOT / "benchmarks" / "README.md").read_text()
    assert [
        path.name for path in (ROOT / "benchmarks").glob("bench_*.py") if f"`{path.name}`" not in table
    ] == []
    documents = "\n".join(path.read_text() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
    assert [path.name for path in (ROOT / "docs").glob("*.md") if path.name not in documents] == []

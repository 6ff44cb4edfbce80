"""Each guard of the store removed in turn: the tests must notice.

    python tests/trials/mutants.py

Copies the project, changes one thing in the copy, and runs the store's tests: all of them until the first that
fails, and the simulated ones alone. Writes the table into benchmarks/results/mutants_<hardware>_<date>.json.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
STORE = Path("src") / "vggt_cache" / "store"
COPIED = ("src", "tests", "docs", "pyproject.toml", "Makefile")
SIMULATED = ["tests/test_store_stateful.py"]
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One guard removed: in one function of the store, calls become other expressions."""

    name: str
    function: str = ""
    """Module, class where there is one, and name, joined by dots."""
    calls: Mapping[str, str] = field(default_factory=dict)
    """What is called, exactly once in the function, and the expression that stands there instead."""
    helper: str = ""
    """A function that the expressions use."""


MUTANTS = (
    Mutant(name="none"),
    Mutant(name="no fsync", function="atomic_file.PendingFile.seal", calls={"self._fs.fsync": "None"}),
    Mutant(
        name="no directory fsync",
        function="atomic_file.PendingFile.publish_new",
        calls={"sync_directory": "None"},
    ),
    Mutant(
        name="no checksum",
        function="shards.OpenShard._read_checked",
        calls={"finish_checksum": "record.checksum"},
    ),
    Mutant(
        name="no key check",
        function="record.finish_checksum",
        calls={"hasher.update": "hasher.update(name.encode() + shape)"},
    ),
    Mutant(
        name="no short-write loop",
        function="filesystem.write_fully",
        calls={"fs.pwrite": "(fs.pwrite(fd, rest, offset), len(rest))[1]"},
    ),
    Mutant(
        name="no short-read loop",
        function="filesystem.read_fully",
        calls={"fs.preadv": "(fs.preadv(fd, [target[done:]], offset + done), len(target) - done)[1]"},
    ),
    Mutant(
        name="pid-only temp names",
        function="atomic_file.PendingFile.__init__",
        calls={"secrets.token_hex": "f'{os.getpid():016x}'"},
    ),
    Mutant(
        name="rename over an existing file",
        function="atomic_file.PendingFile._link_or_rename",
        calls={"self._fs.link": "self._fs.rename(self._name, name, dir_fd=self._dir_fd)"},
    ),
    Mutant(
        name="index trusted over shards",
        function="snapshot.SnapshotTaker.take",
        calls={"self._shards.names": "self.index.shard_names() or self._shards.names()"},
    ),
    Mutant(
        name="index not checked",
        function="index.IndexFile._read",
        calls={"hasher.digest": "head[_HEAD.size : _NAMES_AT]"},
    ),
    Mutant(
        name="index saved before names are synced",
        function="snapshot.SnapshotTaker.save_or_raise",
        calls={"self._shards.sync_names": "None"},
    ),
    Mutant(
        name="fsync repeated after a failure",
        function="atomic_file.PendingFile.seal",
        calls={"self._fs.fsync": "_twice(self._fs.fsync, fd)"},
        helper="def _twice(call, fd):\n    try:\n        call(fd)\n    except OSError:\n        call(fd)\n",
    ),
    Mutant(
        name="linked before it is synced",
        function="writer.ShardWriter._commit",
        calls={
            "file.seal": "None",
            "file.publish_new": "(file.publish_new(name), file.seal(read_only=True))",
        },
    ),
    Mutant(
        name="removed before the index names the successor",
        function="upkeep._StoreKeeper.remove_shards",
        calls={"self._save_index": "None"},
    ),
    Mutant(
        name="index not looked at after a listing",
        function="snapshot.SnapshotTaker.take",
        calls={"self.index.shard_names": "[]", "self.index.load": "None"},
    ),
    Mutant(
        name="listing believed to be complete",
        function="snapshot.SnapshotTaker.take",
        calls={"self._shards.exists": "False"},
    ),
    Mutant(
        name="nothing rescued of a damaged header",
        function="shards.ShardFolder._remains",
        calls={"self._rescued": "[]"},
    ),
    Mutant(
        name="remains of a header not proved",
        function="shards.ShardFolder._rescued",
        calls={"self.is_intact": "True"},
    ),
)


def main() -> int:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import record

    wanted = sys.argv[1:]
    rows = [judge(mutant) for mutant in MUTANTS if not wanted or mutant.name in wanted]
    for row in rows:
        print(f"{row['mutant']:40} {row['killed_by'] or 'ALIVE':90} {row['killed_by_simulation'] or '-'}")
    if not wanted:
        record.write("mutants", "cpu", {"command": "python tests/trials/mutants.py"}, {"mutants": rows})
    wrong = [row for row in rows if bool(row["killed_by"]) == (row["mutant"] == "none")]
    return int(bool(wrong))


def judge(mutant: Mutant) -> dict[str, Any]:
    """Whether the tests notice, and which of them first."""
    with tempfile.TemporaryDirectory(prefix="vggt-mutant-") as folder:
        copy = Path(folder)
        _copy_project(copy)
        _apply(mutant, copy)
        started_s = time.monotonic()
        everything = sorted(str(path.relative_to(copy)) for path in (copy / "tests").glob("test_store_*.py"))
        row: dict[str, Any] = {"mutant": mutant.name}
        row["killed_by_simulation"] = first_failure(copy, SIMULATED)
        row["killed_by"] = first_failure(copy, [name for name in everything if name not in SIMULATED])
        row["killed_by"] = row["killed_by"] or row["killed_by_simulation"]
        row["seconds"] = round(time.monotonic() - started_s, 1)
    print(json.dumps(row), flush=True)
    return row


def _copy_project(copy: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, copy / name)


def _apply(mutant: Mutant, copy: Path) -> None:
    if mutant.function:
        path = copy / STORE / f"{mutant.function.split('.')[0]}.py"
        path.write_text(mutated(mutant, path.read_text()))


def mutated(mutant: Mutant, source: str) -> str:
    """The module's source with the guard removed. Raises ValueError where the function does not call it once."""
    module = ast.parse(source)
    node: ast.AST = module
    for name in mutant.function.split(".")[1:]:
        found = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == name]
        if len(found) != 1:
            raise ValueError(f"mutant {mutant.name!r}: there is no {mutant.function}")
        node = found[0]
    replacing = _Replacing(mutant.calls)
    replacing.visit(node)
    if sorted(replacing.seen) != sorted(mutant.calls):
        raise ValueError(
            f"mutant {mutant.name!r}: {mutant.function} does not call {list(mutant.calls)} once each"
        )
    return f"{ast.unparse(ast.fix_missing_locations(module))}\n\n{mutant.helper}"


class _Replacing(ast.NodeTransformer):
    def __init__(self, calls: Mapping[str, str]) -> None:
        self._calls = calls
        self.seen: list[str] = []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        called = ast.unparse(node.func)
        if called not in self._calls:
            return self.generic_visit(node)
        self.seen.append(called)
        return ast.parse(self._calls[called], mode="eval").body


def first_failure(copy: Path, tests: list[str]) -> str | None:
    """Name of the first test that fails; None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return "a test that never ended"
    if run.returncode == 0:
        return None
    found = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", run.stdout, re.MULTILINE)
    return found[1] if found else f"pytest exited with {run.returncode}"


if __name__ == "__main__":
    sys.exit(main())

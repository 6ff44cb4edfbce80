"""Each guard of the store removed in turn: the tests must notice.

    python tests/trials/mutants.py

Copies the project, changes one thing in the copy, and runs the store's tests: all of them until the first that
fails, and the simulated ones alone. Writes the table into benchmarks/results/mutants_<hardware>_<date>.json.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
STORE = Path("src") / "vggt_cache" / "store"
COPIED = ("src", "tests", "docs", "pyproject.toml", "Makefile")
SIMULATED = ["tests/test_store_stateful.py"]
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of the store's source: the text `old`, which occurs once, becomes `new`."""

    name: str
    old: str
    new: str


MUTANTS = (
    Mutant(name="none", old="", new=""),
    Mutant(name="no fsync", old="        self._fs.fsync(fd)\n", new=""),
    Mutant(
        name="no directory fsync",
        old="        self._drop_temporary_name()\n        sync_directory(self._fs, self._dir_fd)\n",
        new="        self._drop_temporary_name()\n",
    ),
    Mutant(name="no checksum", old="if checksum != record.checksum:", new="if checksum == b'':"),
    Mutant(
        name="no key check",
        old="hasher.update(key + ",
        new="hasher.update(",
    ),
    Mutant(
        name="no short-write loop",
        old="        rest, offset = rest[count:], offset + count\n",
        new="        break\n",
    ),
    Mutant(
        name="no short-read loop",
        old="        if count == 0:\n            break\n        done += count\n",
        new="        done += count\n        break\n",
    ),
    Mutant(
        name="pid-only temp names",
        old='f".tmp-{secrets.token_hex(8)}"',
        new='f".tmp-{os.getpid():016x}"',
    ),
    Mutant(
        name="rename over an existing file",
        old="persist(self._fs.link, self._name, name, dir_fd=self._dir_fd)",
        new="persist(self._fs.rename, self._name, name, dir_fd=self._dir_fd)",
    ),
    Mutant(
        name="index trusted over shards",
        old='        if index.names_text == "\\n".join(names):\n            return cls(index=index)\n',
        new="        return cls(index=index)\n",
    ),
    Mutant(
        name="index rows not checked",
        old="if xxhash.xxh3_64_intdigest(data) != self._checks[bucket]:",
        new="if False:",
    ),
    Mutant(
        name="index saved before names are synced",
        old="            self._reader.sync_names()  # what the index lists must not be lost in a power failure\n",
        new="",
    ),
    Mutant(
        name="fsync repeated after a failure",
        old="        self._fs.fsync(fd)\n",
        new="        try:\n            self._fs.fsync(fd)\n        except OSError:\n            self._fs.fsync(fd)\n",
    ),
    Mutant(
        name="linked before it is synced",
        old="        file.seal(read_only=True)\n        name = next_shard_name("
        "persist(self._fs.list_names, self._dir_fd), self._fs.clock_s())\n        file.publish_new(name)\n",
        new="        name = next_shard_name("
        "persist(self._fs.list_names, self._dir_fd), self._fs.clock_s())\n        file.publish_new(name)\n"
        "        file.seal(read_only=True)\n",
    ),
    Mutant(
        name="pruned for the sake of unsynced names",
        old="        reader.sync_names()\n",
        new="        pass\n",
    ),
    Mutant(
        name="listing believed to be complete",
        old="unlisted = [name for name in known.difference(names) if self._exists(name)]",
        new="unlisted: list[str] = []",
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
    if not mutant.old:
        return
    holders = places(mutant, copy)
    if len(holders) != 1:
        sys.exit(
            f"mutant {mutant.name!r}: its text does not occur once in the store, so it has to be written anew"
        )
    holders[0].write_text(holders[0].read_text().replace(mutant.old, mutant.new))


def places(mutant: Mutant, root: Path = ROOT) -> list[Path]:
    """The file that holds the text which the mutant changes, as often as it does."""
    paths = sorted((root / STORE).glob("*.py"))
    return [path for path in paths for _ in range(path.read_text().count(mutant.old))]


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

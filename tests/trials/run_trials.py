"""Run the store's trials for as long as one likes; unattended, and resumable.

    python tests/trials/run_trials.py --jobs 2              all trials at their stated counts, two at a time
    python tests/trials/run_trials.py --trial stateful --count 100000 --seed 0 --resume
    python tests/trials/run_trials.py --list

Results go to benchmarks/results/trials_<hardware>_<date>.json after every few seconds. With --resume a trial goes
on behind the last seed that is in the newest of these files, if the source that it exercises is the same. A violation
is written down with its seed and the run goes on; `--trial <name> --seed <seed> --count 1` repeats it. The exit
status is 1 if there was any.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SAVE_EVERY_S = 10.0
MOST_FAILURES = 5
"""Seeds of further violations are counted and not written down."""


def main() -> int:
    arguments = _parse()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets decides the order of operations: without this a seed would not be a run.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "PYTHONHASHSEED": "0"})
    sys.path[:0] = [str(ROOT / "src"), str(TESTS), str(ROOT / "benchmarks")]
    import torch

    from trials.catalogue import TRIALS

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # damage is expected here
    if arguments.list:
        for trial in TRIALS.values():
            print(f"{trial.name:20} {trial.count:>9,}  {trial.about}")
        return 0
    results = Results(Path(arguments.results) if arguments.results else ROOT / "benchmarks" / "results")
    names = [arguments.trial] if arguments.trial else list(TRIALS)
    if arguments.jobs > 1:
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(lambda name: run_in_process(TRIALS[name], arguments, results), names))
    else:
        for name in names:
            run_trial(TRIALS[name], arguments, results)
    return int(results.violations > 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trial", help="name of one trial (default: all)")
    parser.add_argument("--count", type=int, help="trials (default: as stated by --list)")
    parser.add_argument(
        "--seed", type=int, help="the first seed (default: 0, or with --resume that of the results)"
    )
    parser.add_argument(
        "--folder", help="where real files are written (default: the system's temporary directory)"
    )
    parser.add_argument("--results", help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time, each in a process of its own")
    parser.add_argument("--resume", action="store_true", help="go on where the newest results end")
    parser.add_argument("--list", action="store_true", help="list the trials")
    return parser.parse_args()


def source_digest(exercises: Sequence[str]) -> str:
    """sha256 of these sources, so that a figure belongs to a program also where nothing is committed."""
    hasher = hashlib.sha256()
    for name in exercises:
        path = ROOT / "src" / "vggt_cache" / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            hasher.update(file.read_bytes())
    return hasher.hexdigest()[:16]


class Results:
    """The results file; written as a whole, by rename."""

    def __init__(self, folder: Path) -> None:
        import record

        self._record, self._folder = record, folder
        self._lock = Lock()
        self.violations = 0
        name = f"trials_{record.hardware_name('cpu')}"
        newest = max(folder.glob(f"{name}_*.json"), default=None)
        self._old: dict[str, Any] = json.loads(newest.read_text())["figures"] if newest else {}
        self._path = folder / f"{name}_{datetime.date.today().isoformat()}.json"
        self._figures: dict[str, Any] = (
            json.loads(self._path.read_text())["figures"] if self._path.exists() else {}
        )

    def of(self, name: str) -> dict[str, Any]:
        """What is known of a trial by now."""
        return self._figures.get(name) or self._old.get(name) or {}

    def save(self, name: str, figures: dict[str, Any]) -> None:
        with self._lock:
            self._save(name, figures)

    def take(self, name: str, folder: Path) -> None:
        """What another process has written of a trial into a folder of its own."""
        figures = Results(folder).of(name)
        if figures:
            self.save(name, figures)
            self.violations += figures["violations"]

    def _save(self, name: str, figures: dict[str, Any]) -> None:
        self._figures[name] = figures
        result = {
            "theme": "trials",
            "date": datetime.date.today().isoformat(),
            "commit": self._record.commit(),
            "machine": self._record.machine(),
            "configuration": {"command": "python tests/trials/run_trials.py", "python_hash_seed": 0},
            "figures": self._figures,
        }
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(self._path)


def run_in_process(trial: Any, arguments: argparse.Namespace, results: Results) -> None:
    """The same in a process of its own, whose end is written down when it comes."""
    with tempfile.TemporaryDirectory(prefix="vggt-results-") as folder:
        own = Results(Path(folder))
        if arguments.resume and results.of(trial.name):
            own.save(trial.name, results.of(trial.name))
        command = [sys.executable, __file__, "--trial", trial.name, "--results", folder]
        command += ["--seed", str(arguments.seed)] if arguments.seed is not None else []
        command += ["--count", str(arguments.count)] if arguments.count else []
        command += ["--folder", arguments.folder] if arguments.folder else []
        subprocess.run([*command, *(["--resume"] if arguments.resume else [])], check=False)
        results.take(trial.name, Path(folder))


def run_trial(trial: Any, arguments: argparse.Namespace, results: Results) -> None:
    """Run one trial to its count, and write down what came of it."""
    from trials.registry import Unavailable

    wanted = arguments.count or trial.count
    figures = _begin(trial, arguments, results)
    saved_s = time.monotonic()
    while figures["trials"] < wanted:
        started_s = time.monotonic()
        try:
            figures["trials"] += _run_seed(trial, figures["next_seed"], arguments.folder)
        except Unavailable as error:
            figures["skipped"] = str(error)
            break
        except Exception as error:
            _note_violation(figures, error)
            results.violations += 1
        figures["next_seed"] += 1
        figures["seconds"] = round(figures["seconds"] + time.monotonic() - started_s, 3)
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            results.save(trial.name, figures)
            saved_s = time.monotonic()
    figures["finished"] = figures["trials"] >= wanted
    results.save(trial.name, figures)
    print(json.dumps({"trial": trial.name, **{k: v for k, v in figures.items() if k != "about"}}), flush=True)


def _begin(trial: Any, arguments: argparse.Namespace, results: Results) -> dict[str, Any]:
    from vggt_cache.doctor import mount_of

    old, digest = results.of(trial.name), source_digest(trial.exercises)
    same_seeds = arguments.seed in (None, old.get("first_seed"))
    if arguments.resume and same_seeds and old.get("source_digest") == digest:
        return {key: value for key, value in old.items() if key != "skipped"}
    return {
        "about": trial.about,
        "trials": 0,
        "violations": 0,
        "failed_seeds": [],
        "first_seed": arguments.seed or 0,
        "next_seed": arguments.seed or 0,
        "seconds": 0.0,
        "file_system": trial.file_system or mount_of(Path(arguments.folder or tempfile.gettempdir()))[0],
        "source_digest": digest,
        "finished": False,
    }


def _run_seed(trial: Any, seed: int, folder: str | None) -> int:
    own = Path(tempfile.mkdtemp(prefix="vggt-trials-", dir=folder))
    try:
        count: int = trial.run(seed, own)
        return count
    finally:
        shutil.rmtree(own)


def _note_violation(figures: dict[str, Any], error: Exception) -> None:
    figures["trials"] += 1
    figures["violations"] += 1
    if len(figures["failed_seeds"]) < MOST_FAILURES:
        figures["failed_seeds"].append([figures["next_seed"], f"{type(error).__name__}: {error}"[:200]])
        traceback.print_exc()


if __name__ == "__main__":
    sys.exit(main())

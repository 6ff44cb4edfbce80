"""A trial in which the coverage of the code leads the search for a header that is misread; it takes atheris."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

from store_kit import shard_path, write_shard
from test_store_format import make_header
from trials.damage import hostile_header
from trials.registry import Unavailable

INPUTS_PER_SEED = 50_000
TESTS = Path(__file__).resolve().parent.parent
LONGEST_HEADER_BYTES = 8192
LONGEST_S = 5
MOST_MEMORY_MIB = 2048
HOSTILE_HEADERS = 200


def fuzzed_headers(seed: int, folder: Path, *, inputs: int = INPUTS_PER_SEED) -> int:
    """A process of its own, since atheris takes over the one it is in."""
    if importlib.util.find_spec("atheris") is None:
        raise Unavailable("atheris is not installed: pip install atheris")
    _write_corpus(folder / "corpus", Random(seed))
    done = subprocess.run(
        _command(seed, folder, inputs), capture_output=True, text=True, errors="replace", env=_environment()
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, (
        f"{said[-3000:]} {[path.read_bytes()[:200] for path in folder.glob('found-*')]}"
    )
    counts = re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)
    assert counts, said[-3000:]
    return int(counts[0])


def _write_corpus(corpus: Path, random: Random) -> None:
    """Sound headers, plain and packed, and hostile ones."""
    corpus.mkdir()
    sound = [make_header(count) for count in range(1, 9)]
    for codec in ("none", "lossless"):
        name = write_shard(corpus.parent / codec, range(3), max_records=3, codec=codec)
        shard = shard_path(corpus.parent / codec, name).read_bytes()
        sound.append(shard[: 8 + int.from_bytes(shard[:8], "little")])
    for number, header in enumerate(sound):
        (corpus / f"sound-{number}").write_bytes(header)
    for number in range(HOSTILE_HEADERS):
        (corpus / f"hostile-{number}").write_bytes(hostile_header(random, random.choice(sound)))


def _command(seed: int, folder: Path, inputs: int) -> list[str]:
    """`seed` 0 would mean a random one."""
    options = {
        "runs": inputs,
        "seed": seed + 1,
        "max_len": LONGEST_HEADER_BYTES,
        "timeout": LONGEST_S,
        "rss_limit_mb": MOST_MEMORY_MIB,
        "artifact_prefix": folder / "found-",
        "print_final_stats": 1,
        "verbosity": 1,
    }
    arguments = [f"-{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "trials.fuzz_target", *arguments, str(folder / "corpus")]


def _environment() -> dict[str, str]:
    paths = [str(TESTS), str(TESTS.parent / "src")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0"}

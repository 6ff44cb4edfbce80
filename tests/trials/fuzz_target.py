"""What `fuzz.py` starts: atheris calls `one_input` until it is told to stop, or something is wrong.

python -m trials.fuzz_target -runs=1000 <folder of first inputs>
"""

from __future__ import annotations

import sys
from random import Random

import atheris

with atheris.instrument_imports(include=["vggt_cache.store.header", "vggt_cache.identity"]):
    import vggt_cache.store.header

from trials.damage import check_header, hostile_header

LENGTH_BYTES = vggt_cache.store.header.LENGTH_BYTES


def one_input(data: bytes) -> None:
    """Raises AssertionError, and atheris reports it, where a header is neither refused nor sound."""
    check_header(data)


def mutated(data: bytes, most_bytes: int, seed: int) -> bytes:
    """The header's parts changed as JSON where it is JSON, else bytes; the length fits mostly."""
    random = Random(seed)
    try:
        changed = hostile_header(random, data) if random.random() < 0.5 else None
    except (ValueError, IndexError, RecursionError):  # no JSON, or none that has parts
        changed = None
    if changed is None:
        text = atheris.Mutate(data[LENGTH_BYTES:], most_bytes - LENGTH_BYTES)
        length = len(text).to_bytes(LENGTH_BYTES, "little") if random.random() < 0.9 else data[:LENGTH_BYTES]
        changed = length + text
    return changed[:most_bytes]


if __name__ == "__main__":
    atheris.Setup(sys.argv, one_input, custom_mutator=mutated)
    atheris.Fuzz()

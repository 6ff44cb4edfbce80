"""The guards that `tests/trials/mutants.py` removes are still where it looks for them."""

from __future__ import annotations

import pytest

from trials.mutants import MUTANTS, ROOT, STORE, Mutant, mutated


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.function], ids=lambda mutant: mutant.name
)
def test_each_guard_is_called_once_by_the_function_that_is_named(mutant: Mutant) -> None:
    source = (ROOT / STORE / f"{mutant.function.split('.')[0]}.py").read_text()
    compile(mutated(mutant, source), mutant.name, "exec")


def test_a_guard_that_has_moved_is_noticed() -> None:
    moved = Mutant(name="moved", function="record.make_rows", calls={"hasher.update": "None"})
    gone = Mutant(name="gone", function="record.no_such_function", calls={"hasher.update": "None"})
    for mutant in (moved, gone):
        with pytest.raises(ValueError, match="mutant"):
            mutated(mutant, (ROOT / STORE / "record.py").read_text())

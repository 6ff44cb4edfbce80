"""The guards that `tests/trials/mutants.py` removes are still where it looks for them."""

from __future__ import annotations

import pytest

from trials.mutants import MUTANTS, Mutant, places


@pytest.mark.parametrize(
    "mutant", [mutant for mutant in MUTANTS if mutant.old], ids=lambda mutant: mutant.name
)
def test_the_text_of_each_guard_stands_in_the_store_once(mutant: Mutant) -> None:
    assert len(places(mutant)) == 1

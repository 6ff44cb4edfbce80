"""Every promise has a test, and docs/reliability.md names it."""

from __future__ import annotations

import promises


def test_every_promise_has_a_test_and_every_marker_names_a_promise() -> None:
    assert set(promises.marked_tests()) == set(promises.promises())


def test_there_are_nine_promises_of_the_store_and_ten_of_the_readme() -> None:
    readme = promises.readme_promises((promises.ROOT / "README.md").read_text())
    assert (len(promises.STORE), len(readme)) == (9, 10)
    assert not promises.STORE.keys() & readme.keys()


def test_the_table_of_promises_is_up_to_date() -> None:
    text = promises.DOCUMENT.read_text()
    assert promises.with_table(text) == text, "run: python tests/promises.py --write"
    assert promises.table() in text

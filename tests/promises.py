"""Which tests show that a promise is kept: those that carry its marker.

    python tests/promises.py            the table
    python tests/promises.py --write    puts it into docs/reliability.md

A test carries the marker of a promise where it fails as soon as what keeps the promise is taken away.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
STORE = {
    "exact or an error": "`get` gives the bytes, dtype and shape committed under the key, or None, or an error",
    "committed survives": "after `commit()` a shard survives a kill, and a power loss where the disk honours fsync",
    "a failure commits nothing": "after a failed write, fsync or close nothing is committed and no file is left",
    "shards never change": "a shard is never modified; of two writers of one key both commit, one wins everywhere",
    "one snapshot": "a reader sees one snapshot until `refresh()`; all ranks of a training use the same one",
    "any index, any place": "no lost or damaged index, no move, link or read-only mount changes an answer",
    "fork, spawn and few descriptors": "safe under fork and spawn, with few descriptors and 64 bytes a feature",
    "hostile input": "bombs and hostile headers are refused before memory is taken; nothing is unpickled",
    "modes of the umask": "files have the modes of the user's umask",
}
"""The promises of the store: the name in the marker, and what is promised."""


def readme_promises(readme: str) -> dict[str, str]:
    """Those of the section "What is promised": the bold words, and the first sentence behind them."""
    section = readme.split("\n## What is promised\n")[1].split("\n## ")[0]
    found = re.findall(r"^- \*\*(.+?)\.\*\* (.+?[.:;])(?=\s)", section, re.MULTILINE | re.DOTALL)
    return {name: f"{' '.join(sentence.split())[:-1]}." for name, sentence in found}


def promises() -> dict[str, str]:
    return {**STORE, **readme_promises((ROOT / "README.md").read_text())}


def marked_tests() -> dict[str, list[str]]:
    """The tests of each name that is in a marker: file and function."""
    tests: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for test, name in _markers(ast.parse(path.read_text())):
            tests.setdefault(name, []).append(f"{path.name}::{test}")
    return tests


def _markers(module: ast.Module) -> Iterator[tuple[str, str]]:
    for test in ast.walk(module):
        if not isinstance(test, ast.FunctionDef):
            continue
        for decorator in test.decorator_list:
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.promise":
                for name in decorator.args:
                    yield test.name, ast.literal_eval(name)


def table() -> str:
    tests = marked_tests()
    rows = ["| promise | says | tests |", "|---|---|---|"]
    for name, sentence in promises().items():
        named = "<br>".join(f"`{test}`" for test in tests.get(name, []))
        rows.append(f"| {name} | {_without_links(sentence)} | {named} |")
    return "\n".join(rows)


def _without_links(text: str) -> str:
    return re.sub(r" ?\(?\[([^]]*)\]\([^)]*\)\)?", "", text)


def with_table(text: str) -> str:
    """The document with the table as it is now."""
    block = f"<!-- promises -->\n{table()}\n<!-- end of promises -->"
    return re.sub("<!-- promises -->.*<!-- end of promises -->", lambda _: block, text, flags=re.DOTALL)


def main() -> int:
    if "--write" in sys.argv[1:]:
        DOCUMENT.write_text(with_table(DOCUMENT.read_text()))
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())

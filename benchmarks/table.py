"""The documents' tables of figures, made from the newest result of each theme and machine.

`python benchmarks/table.py` writes them between the marks in the READMEs and the guide; with `--check` it only says
whether they are as they should be (exit code 1 if not). What the rows say is in `table_rows.py` and `table_texts.py`.
Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import table as peers_table
from table_rows import rows_of
from table_texts import CHINESE, CHINESE_HEAD, ENGLISH, ENGLISH_HEAD

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- figures: made by benchmarks/table.py -->", "<!-- end of figures -->"

ENGLISH_TEXTS, CHINESE_TEXTS = (ENGLISH_HEAD, ENGLISH), (CHINESE_HEAD, CHINESE)
TEXTS = {"README.md": ENGLISH_TEXTS, "README.zh-CN.md": CHINESE_TEXTS, "docs/guide.md": ENGLISH_TEXTS}
PEERS = {"README.md": "en", "README.zh-CN.md": "zh"}
"""Language of the table of peers in the documents that show it."""
ONLY = {"docs/guide.md": ("step",)}
"""Themes of a document that does not show all of them."""


def newest_results() -> list[dict[str, Any]]:
    """The last result of each theme and machine, by date."""
    found = {}
    for path in sorted(
        ROOT.glob("benchmarks/results/*_*_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]
    ):
        found[path.stem.rsplit("_", 1)[0]] = json.loads(path.read_text())
    return [found[name] for name in sorted(found)]


def rows(result: dict[str, Any], texts: dict[str, tuple[str, str, str]]) -> Iterator[str]:
    machine = result["machine"]["gpu"] or f"{result['machine']['cores']} x {result['machine']['cpu']}"
    for name, values in rows_of(result["theme"], result["figures"], result["configuration"]):
        cells = (cell.format(**values) for cell in texts[name])
        yield f"| {' | '.join(cells)} | {machine} |"


def with_table(name: str) -> str:
    """The document with its tables as the results say."""
    content = (ROOT / name).read_text(encoding="utf-8")
    results = newest_results()
    head, texts = TEXTS[name]
    shown = [result for result in results if result["theme"] in ONLY.get(name, (result["theme"],))]
    figures = [head, "|---|---|---|---|", *(row for result in shown for row in rows(result, texts))]
    content = between(content, BEGIN, END, figures)
    peers = [result for result in results if result["theme"] == "peers"]
    if name in PEERS and peers and peers_table.BEGIN in content:
        newest = max(peers, key=lambda result: result["date"])
        content = between(content, peers_table.BEGIN, peers_table.END, peers_table.lines(newest, PEERS[name]))
    return content


def between(content: str, begin: str, end: str, lines: list[str]) -> str:
    """The content with these lines between the two marks."""
    before, rest = content.split(begin)
    return "\n".join([before + begin, *lines, end]) + rest.split(end)[1]


def main() -> int:
    stale = [name for name in TEXTS if with_table(name) != (ROOT / name).read_text(encoding="utf-8")]
    if "--check" not in sys.argv:
        for name in stale:
            (ROOT / name).write_text(with_table(name), encoding="utf-8")
        return 0
    for name in stale:
        print(
            f"[ERROR] the figures in {name} are not those of benchmarks/results: run python benchmarks/table.py"
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

"""The documents' tables of figures, made from the newest result of each theme and machine.

`python benchmarks/table.py` writes them between the marks in the documents; with `--check` it only says whether they
are as they should be (exit code 1 if not). What the rows say is in `table_rows.py`, `table_texts.py` and
`table_disk.py`. Needs nothing but Python.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import table_disk
from peers import table as peers_table
from table_rows import rows_of
from table_texts import HEADS, TEXTS

ROOT = Path(__file__).resolve().parent.parent

Result = dict[str, Any]
DOCUMENTS = {
    "README": ("disk", "headlines"),
    "docs/performance": ("figures", "peers"),
    "docs/guide": ("step",),
    "docs/where_caches_live": ("places",),
}
"""Which tables a document has; each exists in both languages."""
ENDINGS = {"en": ".md", "zh": ".zh.md"}
HEADLINES: tuple[tuple[str, dict[str, object]], ...] = (
    ("step", {}),
    ("causal", {}),
    ("precompute", {}),
    ("encoder", {"context": "causal", "width": 644}),
    ("reading", {}),
    ("cold_throttled", {}),
    ("codec_lossless", {}),
    ("codec_int8", {}),
    ("index", {}),
    ("startup", {}),
)
"""The rows of the READMEs, in this order: a row's name, and values that tell it from others of the name."""


PLACES = {"reading", "cold_disk", "cold_throttled", "cold_latency", "object_store", "staging"}
"""The rows that say what a place gives which a cache may lie in."""


def file_of(document: str, language: str) -> Path:
    chinese_readme = document == "README" and language == "zh"
    return ROOT / ("README.zh-CN.md" if chinese_readme else document + ENDINGS[language])


def newest_results() -> list[Result]:
    """The last result of each theme and machine, by date."""
    found = {}
    for path in sorted(
        ROOT.glob("benchmarks/results/*_*_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1]
    ):
        found[path.stem.rsplit("_", 1)[0]] = json.loads(path.read_text())
    return [found[name] for name in sorted(found)]


def one_of_each_theme(results: list[Result]) -> dict[str, Result]:
    """Where several machines measured one theme: a GPU's result before a CPU's, then the newest."""
    ordered = sorted(results, key=lambda one: (one["machine"]["gpu"] is not None, one["date"]))
    return {result["theme"]: result for result in ordered}


def rows(result: Result, language: str) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Name, values and text of each row."""
    machine = result["machine"]["gpu"] or f"{result['machine']['cores']} x {result['machine']['cpu']}"
    for name, values in rows_of(result["theme"], result["figures"], result["configuration"]):
        cells = (cell.format(**values) for cell in TEXTS[language][name])
        yield name, values, f"| {' | '.join(cells)} | {machine} |"


def headlines(results: list[Result], language: str) -> list[str]:
    found = [row for result in one_of_each_theme(results).values() for row in rows(result, language)]
    chosen = [
        next(line for name, values, line in found if name == wanted and marks.items() <= values.items())
        for wanted, marks in HEADLINES
    ]
    return [*HEADS[language], *chosen]


def figures(results: list[Result], language: str, names: Collection[str] | None = None) -> list[str]:
    found = (one for result in results for one in rows(result, language))
    return [*HEADS[language], *(line for name, _, line in found if names is None or name in names)]


TABLES: dict[str, Callable[[list[Result], str], list[str]]] = {
    "disk": lambda results, language: table_disk.lines(one_of_each_theme(results), language),
    "headlines": headlines,
    "figures": figures,
    "step": lambda results, language: figures([one for one in results if one["theme"] == "step"], language),
    "places": lambda results, language: figures(results, language, PLACES),
    "peers": lambda results, language: peers_table.lines(one_of_each_theme(results)["peers"], language),
}


def with_tables(document: str, language: str, results: list[Result]) -> str:
    """The document with its tables as the results say. A mark that is missing is a ValueError."""
    content = file_of(document, language).read_text(encoding="utf-8")
    for name in DOCUMENTS[document]:
        begin, end = f"<!-- {name}: made by benchmarks/table.py -->", f"<!-- end of {name} -->"
        before, rest = content.split(begin)
        _, after = rest.split(end)
        content = "\n".join([before + begin, *TABLES[name](results, language), end]) + after
    return content


def main() -> int:
    results = newest_results()
    made = {
        file_of(document, language): with_tables(document, language, results)
        for document in DOCUMENTS
        for language in ENDINGS
    }
    stale = [path for path, content in made.items() if content != path.read_text(encoding="utf-8")]
    if "--check" not in sys.argv:
        for path in stale:
            path.write_text(made[path], encoding="utf-8")
        return 0
    for path in stale:
        name = path.relative_to(ROOT)
        print(
            f"[ERROR] the figures in {name} are not those of benchmarks/results: run python benchmarks/table.py"
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

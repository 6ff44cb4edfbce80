"""Write the tables of docs/reliability.md from the newest results.

python tests/trials/table.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "benchmarks" / "results"


def newest(theme: str) -> dict[str, Any]:
    """The result of this theme with the latest date in its name."""
    path = max(RESULTS.glob(f"{theme}_*.json"), key=lambda path: path.stem.rsplit("_", 1)[1])
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def trials_table() -> str:
    result = newest("trials")
    rows = [
        "| trial | one trial is | on | trials | violations | seeds | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["figures"].items():
        done = (
            f"{row['trials']:,} | {row['violations']:,} | {row['first_seed']:,} to {row['next_seed'] - 1:,}"
        )
        if "skipped" in row and not row["trials"]:
            done = f"not on this machine: {row['skipped']} | - | -"
        rows.append(
            f"| `{name}` | {row['about']} | {row['file_system']} | {done} | {row['source_digest'][:6]} |"
        )
    rows += [
        "",
        f"{result['date']}, commit {result['commit']}; `source` begins the digest of what the trial exercises; ",
    ]
    machine = result["machine"]
    rows[-1] += f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}."
    return "\n".join(rows)


def mutants_table() -> str:
    result = newest("mutants")
    rows = ["| guard removed | killed by | killed by the simulation |", "|---|---|---|"]
    for row in result["figures"]["mutants"]:
        killers = (_test(row[column]) for column in ("killed_by", "killed_by_simulation"))
        rows.append(f"| {row['mutant']} | {' | '.join(killers)} |")
    return "\n".join([*rows, "", f"{result['date']}, commit {result['commit']}."])


def _test(name: str | None) -> str:
    return f"`{name.rsplit('::', 2)[-2 if name.endswith('::runTest') else -1]}`" if name else "-"


def with_tables(text: str) -> str:
    """The document with both tables as the newest results have them."""
    for mark, table in (("trials", trials_table()), ("mutants", mutants_table())):
        block = f"<!-- {mark} -->\n{table}\n<!-- end of {mark} -->"
        text = re.sub(
            rf"<!-- {mark} -->.*?<!-- end of {mark} -->", lambda _, b=block: b, text, flags=re.DOTALL
        )  # type: ignore[misc]
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text()))
    sys.exit(0)

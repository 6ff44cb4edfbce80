"""What a run of `gpu.py` says: `python benchmarks/gpu_rows.py RESULTS`, the folder with `figures.jsonl`.

Prints how each step ended, the rows of the documents' tables, every goal and every prediction beside its figure.
`--write` puts the run into `results/`: one file with all of it (theme `gpu`), and one for each theme whose benchmark
was run at full size (`encoder`, `causal`, `precompute`, `step`), from which `table.py` takes the rows. Needs nothing
but Python.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import table
from gpu_expected import GOALS, NEAR, PREDICTIONS
from gpu_steps import notes

Figures = dict[str, dict[str, Any]]
RESULTS = Path(__file__).parent / "results"


def report(out: Path) -> list[str]:
    """All that there is to say, as lines of text."""
    figures = notes.read(out)
    return [
        *endings(notes.lines(out)),
        "",
        *table.figures(results(figures), "en"),
        "",
        *goals(figures),
        "",
        *predictions(figures),
    ]


# ---------------------------------------------------------------- how it went


def endings(lines: list[dict[str, Any]]) -> Iterator[str]:
    """A line for each step, the last time that it ran, and one for each figure that failed in it."""
    last: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = {}
    for line in lines:
        step = line["step"]
        if "error" in line:
            failed.setdefault(step, []).append(f"{'':20} {line['name']}: {line['error'][:200]}")
        elif "skipped" in line:
            last[step] = [f"{step:20} not run: {line['skipped']}"]
        elif "ended" in line:
            how = {0: "well", None: "killed at its limit"}.get(line["ended"], f"exit code {line['ended']}")
            last[step] = [f"{step:20} {line['took_s']:6.1f} s  {how}", *failed.pop(step, [])]
    for step in last:
        yield from last[step]


# ---------------------------------------------------------------- goals and predictions


def figure(figures: Figures, path: str) -> float | None:
    """`step.name` or `step.name.key`; None where there is no such number."""
    found: Any = figures
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return float(found) if isinstance(found, (int, float)) else None


def goals(figures: Figures) -> Iterator[str]:
    yield "| aimed at | | measured | |"
    yield "|---|---|---|---|"
    for goal in GOALS:
        found = figure(figures, goal.figure)
        verdict = "" if found is None else "reached" if goal.is_met(found) else "**missed**"
        yield f"| {goal.figure} | {goal} | {shown(found)} | {verdict} |"


def predictions(figures: Figures) -> Iterator[str]:
    hardware = str(figures.get("machine", {}).get("hardware", ""))
    yield "| predicted | because | range | measured | |"
    yield "|---|---|---|---|---|"
    for one in PREDICTIONS:
        expected = one.range_for(hardware)
        if expected is None:
            continue
        (low, high), found = expected, figure(figures, one.figure)
        verdict = ""
        if found is not None:
            verdict = "right" if low * (1 - NEAR) <= found <= high * (1 + NEAR) else "**wrong**"
        between = shown(low) if low == high else f"{shown(low)} to {shown(high)}"
        yield f"| {one.figure} | {one.because} | {between} | {shown(found)} | {verdict} |"


def shown(number: float | None) -> str:
    return "not measured" if number is None else f"{number:.4g}"


# ---------------------------------------------------------------- results


def results(figures: Figures) -> list[dict[str, Any]]:
    """As `record.py` writes them: all figures, and the themes that can be told from them."""
    machine = figures.get("machine", {})
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": machine.get("software", {}).get("commit", "unknown"),
        "machine": machine.get("machine", {"gpu": None, "cores": "?", "cpu": "?"}),
    }
    themes = {"gpu": ({}, figures)}
    for name, of in (("encoder", encoder), ("causal", causal), ("precompute", precompute), ("step", step)):
        try:
            themes[name] = of(figures)
        except (KeyError, IndexError):  # a step that was not run, or that was killed before it knew this
            continue
    return [
        {"theme": theme, **common, "configuration": configuration, "figures": found}
        for theme, (configuration, found) in themes.items()
    ]


Theme = tuple[dict[str, Any], dict[str, Any]]
"""Configuration and figures."""


def encoder(figures: Figures) -> Theme:
    """The speeds at both widths, over the mean of the peaks before and after."""
    frame = figures["frame"]
    peaks = [frame[name] for name in ("peak_before", "peak_after") if name in frame]
    peak = sum(peaks) / len(peaks)
    found: dict[str, Any] = {"matrix_peak_flop_per_s": peak}
    for width in map(str, frame["configuration"]["widths"]):
        for name, speed in ((f"frame_{width}", frame[width]), (f"causal_{width}", figures["causal"][width])):
            found[name] = {**speed, "share_of_matrix_peak": speed["flop_per_s"] / peak}
    return frame["configuration"], found


def causal(figures: Figures) -> Theme:
    """At the larger width, which is JanusVLN's."""
    width = widths_of(figures["causal"])[-1]
    return {"width": int(width)}, figures["causal"][width]


def widths_of(found: dict[str, Any]) -> list[str]:
    """Those that a step has a figure of, the smallest first."""
    return sorted((name for name, value in found.items() if name.isdigit() and value), key=int)


def precompute(figures: Figures) -> Theme:
    """At the smaller width, which is the command's default."""
    width = widths_of(figures["precompute"])[0]
    found = figures["precompute"][width]
    return {"frames": found["frames"], "image_size": int(width)}, found


def step(figures: Figures) -> Theme:
    found = figures["step"]
    memory = {name.removeprefix("memory_"): one for name, one in found.items() if name.startswith("memory_")}
    parts = {"memory": memory} | ({"profile": found["profile"]} if "profile" in found else {})
    return found["configuration"], found["speeds"] | parts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the folder that gpu.py filled")
    parser.add_argument("--write", action="store_true", help="also write files into benchmarks/results")
    arguments = parser.parse_args()
    if not (arguments.results / notes.FILE).is_file():
        parser.error(f"there is no {notes.FILE} in {arguments.results}: name the folder that gpu.py filled")
    print("\n".join(report(arguments.results)))
    if arguments.write:
        figures = notes.read(arguments.results)
        if figures.get("machine", {}).get("machine", {}).get("gpu") is None:
            parser.error(
                "these figures name no GPU, so they are of a dry run or lack the step machine: not written"
            )
        for result in results(figures):
            hardware = figures["machine"]["hardware"]
            path = RESULTS / f"{result['theme']}_{hardware}_{result['date']}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

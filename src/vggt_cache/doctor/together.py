"""What processes that share a cache rely on, tried out with a second process on the same files."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from vggt_cache.doctor import partner as partner_module
from vggt_cache.doctor.findings import Finding
from vggt_cache.doctor.partner import race

VISIBILITY_TIMEOUT_S = 10.0
SLOW_VISIBILITY_S = 1.0
_ANSWER_TIMEOUT_S = 60.0
_RACES = 50
_SWAP_S = 0.25


class Partner:
    """A second process that works on the same files (see `partner`). Use as a context manager.

    Its methods raise OSError when the process cannot be started, fails, or does not answer.
    """

    def __enter__(self) -> Partner:
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(Path(partner_module.__file__).resolve())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        with self._process:
            pass

    def ask(self, do: str, **request: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}).encode() + b"\n")

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        stream = self._process.stdout
        assert stream is not None
        ready, _, _ = select.select([stream], [], [], _ANSWER_TIMEOUT_S)
        line = stream.readline() if ready else b""
        if not line:
            raise OSError("the second process does not answer")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise OSError(f"the second process reports: {answer['error']}")
        return answer


def exclusive_create(folder: Path, partner: Partner) -> Finding:
    """Two processes create the same files at the same moment: each must be won exactly once."""
    paths = [str(folder / f"race-{i}") for i in range(_RACES)]
    start_at_s = time.monotonic() + 0.02
    partner.ask("race", paths=paths, start_at_s=start_at_s)
    mine = race(paths, start_at_s)
    winners = [*mine, *partner.answer()["won"]]
    if sorted(winners) == sorted(paths):
        meaning = "Two processes never create the same file, so work is claimed by one of them only."
        return Finding("exclusive create", "ok", f"{_RACES} of {_RACES}", meaning)
    return Finding(
        "exclusive create", "fail", f"{len(set(winners))} won, {len(winners) - len(set(winners))} twice",
        "Two processes can create the same file here, so work would be done twice: run one process at a time, "
        "or use another file system.",
    )  # fmt: skip


def atomic_replace(folder: Path, partner: Partner) -> Finding:
    """While one process replaces a file by rename, the other must always find a whole one."""
    path, contents = folder / "replaced", ["a" * 65536, "b" * 65536]
    path.write_text(contents[0])
    partner.ask("observe", path=str(path), contents=contents, duration_s=_SWAP_S)
    partner.answer()
    until, swaps = time.monotonic() + _SWAP_S, 0
    while time.monotonic() < until:
        swaps += 1
        temporary = folder / "replaced.tmp"
        temporary.write_text(contents[swaps % 2])
        os.replace(temporary, path)
    seen = partner.answer()
    value = f"{swaps} swaps, {seen['whole']} reads"
    if seen["absent"] or seen["torn"]:
        return Finding(
            "atomic rename", "fail", f"{value}, {seen['absent']} absent, {seen['torn']} torn",
            "A reader can find a file missing or mixed while it is replaced, so readers and writers must not run "
            "at the same time here.",
        )  # fmt: skip
    meaning = "Another process finds either the old or the new file, never a mixture."
    return Finding("atomic rename", "ok", value, meaning)


def visible_name(folder: Path, partner: Partner) -> Finding:
    """How soon another process sees a file that was renamed into place."""
    return _visibility(folder, partner, "new name", "appeared", existing=False)


def visible_content(folder: Path, partner: Partner) -> Finding:
    """How soon another process sees new contents under an old name."""
    return _visibility(folder, partner, "new contents", "changed", existing=True)


def _visibility(folder: Path, partner: Partner, name: str, stem: str, *, existing: bool) -> Finding:
    path, temporary = folder / stem, folder / f"{stem}.tmp"
    if existing:
        path.write_text("before")
    temporary.write_text("after")
    partner.ask("watch", path=str(path), content="after", timeout_s=VISIBILITY_TIMEOUT_S)
    partner.answer()
    time.sleep(0.02)  # lets the other process look, and possibly cache, what is there before
    renamed_at_s = time.monotonic()
    os.replace(temporary, path)
    seen_at_s = partner.answer()["seen_at_s"]
    if seen_at_s is None:
        return Finding(
            f"{name} visible", "fail", f"not within {VISIBILITY_TIMEOUT_S:.0f} s",
            "Another process on this machine does not see a commit, so processes cannot share a cache here.",
        )  # fmt: skip
    delay_s = seen_at_s - renamed_at_s
    status = "warn" if delay_s > SLOW_VISIBILITY_S else "ok"
    meaning = (
        "That long after a rename another process on this machine sees it; other machines may take longer."
    )
    return Finding(f"{name} visible", status, f"{delay_s * 1000:.1f} ms", meaning)


TRIALS = (exclusive_create, atomic_replace, visible_name, visible_content)

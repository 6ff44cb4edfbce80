"""What processes that share a cache rely on, tried out with a second process on the same files."""

from __future__ import annotations

import os
import time
from pathlib import Path

from vggt_cache.doctor.commit import SPEC, WatchedSystem, commit_shard
from vggt_cache.doctor.findings import Finding
from vggt_cache.doctor.partner import Partner, compete, observe, watch_content, watch_names, won
from vggt_cache.precompute.claims import Claims

VISIBILITY_TIMEOUT_S = 10.0
SLOW_VISIBILITY_S = 1.0
_BLOCKS = 50
_SWAP_S = 0.25


def exclusive_create(folder: Path, partner: Partner) -> Finding:
    """Two processes claim the same blocks at the same moment: each must be won exactly once."""
    blocks = [f"{number:032x}" for number in range(_BLOCKS)]
    partner.ask(compete, folder, blocks)
    with Claims(folder) as claims:
        winners = [*won(claims, blocks, partner.answer()), *partner.answer()]
    if sorted(winners) == blocks:
        meaning = "Two processes never create the same file, so work is claimed by one of them only."
        return Finding("exclusive create", "ok", f"{_BLOCKS} of {_BLOCKS}", meaning)
    twice = len(winners) - len(set(winners))
    meaning = (
        "Two processes can create the same file here, so work would be done twice: run one process at a time, "
        "or use another file system."
    )
    return Finding("exclusive create", "fail", f"{len(set(winners))} won, {twice} twice", meaning)


def atomic_replace(folder: Path, partner: Partner) -> Finding:
    """While one process replaces a file by rename, as the index is, the other must always find a whole one."""
    path, temporary = folder / "replaced", folder / "replaced.tmp"
    contents = [b"a" * 65536, b"b" * 65536]
    path.write_bytes(contents[0])
    partner.ask(observe, path, contents, _SWAP_S)
    partner.answer()
    until_s, swaps = time.monotonic() + _SWAP_S, 0
    while time.monotonic() < until_s:
        swaps += 1
        temporary.write_bytes(contents[swaps % 2])
        os.replace(temporary, path)
    seen = partner.answer()
    value = f"{swaps} swaps, {seen['whole']} reads"
    if seen["absent"] or seen["torn"]:
        meaning = (
            "A reader can find a file missing or mixed while it is replaced, so readers and writers must not run "
            "at the same time here."
        )
        return Finding(
            "atomic rename", "fail", f"{value}, {seen['absent']} absent, {seen['torn']} torn", meaning
        )
    meaning = "Another process finds either the old or the new file, never a mixture."
    return Finding("atomic rename", "ok", value, meaning)


def visible_name(folder: Path, partner: Partner) -> Finding:
    """How soon another process lists a shard that was committed."""
    shards, fs = folder / SPEC.short_name / "shards", WatchedSystem()
    shards.mkdir(parents=True)
    partner.ask(watch_names, shards, ".safetensors", VISIBILITY_TIMEOUT_S)
    partner.answer()
    commit_shard(folder, fs, [bytes(4096)])
    return _visible("new name visible", fs.began_at_s["link"], partner.answer())


def visible_content(folder: Path, partner: Partner) -> Finding:
    """How soon another process sees new contents under an old name."""
    path, temporary = folder / "changed", folder / "changed.tmp"
    path.write_bytes(b"before")
    temporary.write_bytes(b"after")
    partner.ask(watch_content, path, b"after", VISIBILITY_TIMEOUT_S)
    partner.answer()
    time.sleep(0.02)  # lets the other process look, and possibly cache, what is there before
    renamed_at_s = time.monotonic()
    os.replace(temporary, path)
    return _visible("new contents visible", renamed_at_s, partner.answer())


def _visible(name: str, done_at_s: float, seen_at_s: float | None) -> Finding:
    if seen_at_s is None:
        meaning = (
            "Another process on this machine does not see a commit, so processes cannot share a cache here."
        )
        return Finding(name, "fail", f"not within {VISIBILITY_TIMEOUT_S:.0f} s", meaning)
    status = "warn" if seen_at_s - done_at_s > SLOW_VISIBILITY_S else "ok"
    meaning = (
        "That long after a rename another process on this machine sees it; other machines may take longer."
    )
    return Finding(name, status, f"{(seen_at_s - done_at_s) * 1000:.1f} ms", meaning)


TRIALS = (exclusive_create, atomic_replace, visible_name, visible_content)

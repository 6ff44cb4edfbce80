"""What an examination reports: a table of findings, and what each of them means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MEANINGS = {
    "directory: ok": "{asked} does not exist yet, so its nearest parent is examined.",
    "directory mode: ok": "Other members of the group can enter it and read a cache in it.",
    "directory mode: warn": "Other members of the group cannot enter it: for a shared cache, chmod g+rx it.",
    "writable: ok": "You can write a cache here.",
    "writable: warn":
        "You can read a cache here but not write one, and the checks that write are left out: for precompute, "
        "get write access.",
    "free space: room":
        "There is room for about {features:,} features of 4.2 MB (VGGT-1B, bfloat16, 518 pixels wide){remedy}.",
    "free inodes: ok": "A cache needs few: one for each shard of many features.",
    "free inodes: no limit": "The file system does not limit the number of files.",
    "free inodes: fail":
        "Hardly any file can be created, whatever the free bytes: remove files or ask for more inodes.",
    "second process: fail":
        "No second process could be started, so nothing that needs one was tried out: see the reason.",
    "exclusive create: ok": "Two processes never create the same file, so work is claimed by one of them only.",
    "exclusive create: fail":
        "Two processes can create the same file here, so work would be done twice: run one process at a time, "
        "or use another file system.",
    "atomic rename: ok": "Another process finds either the old or the new file, never a mixture.",
    "atomic rename: fail":
        "A reader can find a file missing or mixed while it is replaced, so readers and writers must not run "
        "at the same time here.",
    "visible: soon":
        "That long after a rename another process on this machine sees it; other machines may take longer.",
    "visible: never": "Another process on this machine does not see a commit, so processes cannot share a cache here.",
    "fsync of a file: ok": "Works; each commit waits that long.",
    "fsync of a file: fail": "After a power failure a committed shard could be lost.",
    "fsync of a directory: ok": "Works; each commit waits that long.",
    "fsync of a directory: warn": "After a power failure the name of a committed shard could be lost.",
    "hard links: ok": "A shard gets its name by one, which can take no other file's place.",
    "hard links: warn": "A shard is renamed instead; copying a cache with cp -l will not work here.",
    "file locks: ok": "prune sees by one that a writer lives.",
    "file locks: warn": "prune cannot see that a writer lives, and goes by the age of its file.",
    "file modes: ok": "Shards are made read-only.",
    "file modes: warn": "Shards stay writable: nothing but care protects them from being changed.",
    "new files: ok": "Members of the group can read the cache that you write.",
    "new files: warn":
        "Only you can read the cache that you write: for a shared one, run umask 027 before precompute.",
    "commit: fail": "The store cannot write a shard here: {error}.",
    "speed: unknown": "There is too little free space for a test file, or it could not be written.",
    "speed: known": "That is {features:,.0f} features of 4.2 MB a second {how}.",
    "read speed: fail": "What is read is not what was written, so nothing can be kept here: have the disk checked.",
    "clock: ok": "The file system's clock agrees with this machine's.",
    "clock: still": "Touching a file does not move its time within 50 ms, so that a dead process is noticed late.",
    "clock: warn":
        "The file system's clock and this machine's differ, so that images written lately are read again "
        "when planning: let both use NTP.",
    "file names: ok": "A cache uses names of up to {limit} bytes.",
    "file names: fail": "Names of shards may be that long: use another file system.",
    "create if absent: ok": "Of several that make one object at once one succeeds, so work is claimed by one process.",
    "create if absent: warn":
        "Several can make the same object at once, so two processes may do the same work; no feature is lost by it.",
    "create if absent: refused":
        "The service does not make objects on the condition that there is none, so nothing can be written: for S3, "
        "use a service that knows If-None-Match.",
    "listed after a put: ok": "A new shard is seen by whoever lists the bucket next.",
    "listed after a put: fail": "A new shard is seen late, so readers must not begin while writers are at work.",
    "contents replaced: ok": "Who reads an object that was replaced gets the new one.",
    "contents replaced: fail": "An index may be read as it was before: put no proxy that caches before the bucket.",
    "part of an object: ok": "A feature is read by one request for its bytes alone.",
    "part of an object: fail": "What is read is not what was written, so no cache can be kept here.",
    "answer: ok": "Each feature takes at least that long to arrive; several readers hide it (--vggt_cache_threads).",
    "any: refused": "The operating system refused an operation that a cache needs: see the reason.",
    "cleaning up: warn": "This temporary folder of the examination could not be removed: remove it by hand.",
}  # fmt: skip
"""By name and status of the finding, or by a case of its own."""


@dataclass(frozen=True)
class Finding:
    """One result of an examination."""

    name: str
    status: str
    """`ok`; `warn`: works, with a drawback; `fail`: a cache here would break a promise."""
    value: str
    """What was measured, with its unit."""
    meaning: str
    """One sentence: what the value means for a cache and, where that helps, what to do."""


def finding(name: str, status: str, value: str, case: str = "", **details: object) -> Finding:
    """With its meaning from the table, in which `details` stand."""
    return Finding(name, status, value, MEANINGS[case or f"{name}: {status}"].format(**details))


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as a table for a terminal, with a last line that counts them."""
    names = max((len(found.name) for found in findings), default=0)
    values = max((len(found.value) for found in findings), default=0)
    lines = [f"{f.status:<4}  {f.name:<{names}}  {f.value:<{values}}  {f.meaning}" for f in findings]
    counts = (f"{sum(f.status == status for f in findings)} {status}" for status in ("ok", "warn", "fail"))
    return "\n".join([*lines, f"{len(findings)} checks: {', '.join(counts)}"])


def reason(error: Exception) -> str:
    """Why the operating system refused; the sentence of an error of our own."""
    return getattr(error, "strerror", None) or str(error)

"""What an examination reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STATUSES = ("ok", "warn", "fail")


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


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings as a table for a terminal, with a last line that counts them."""
    names = max((len(finding.name) for finding in findings), default=0)
    values = max((len(finding.value) for finding in findings), default=0)
    lines = [f"{f.status:<4}  {f.name:<{names}}  {f.value:<{values}}  {f.meaning}" for f in findings]
    counts = {status: sum(f.status == status for f in findings) for status in STATUSES}
    lines.append(f"{len(findings)} checks: {', '.join(f'{n} {status}' for status, n in counts.items())}")
    return "\n".join(lines)

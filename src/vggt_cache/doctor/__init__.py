"""Examines a directory on the user's own mount: is it fit to hold a feature cache?

The store itself commits, reads and claims there, with a second process beside it, in a temporary folder that is
removed again; nothing else in the directory is touched.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from vggt_cache.doctor import together
from vggt_cache.doctor.commit import clock, long_name, tried_commit
from vggt_cache.doctor.findings import Finding, format_findings
from vggt_cache.doctor.partner import Partner
from vggt_cache.doctor.place import access, file_system, free_inodes, free_space
from vggt_cache.errors import CacheAccessError, CommitError

__all__ = ["Finding", "examine", "format_findings"]


def examine(directory: str | os.PathLike[str]) -> list[Finding]:
    """All findings about a directory: a cache, an empty directory, or one that does not exist yet.

    In the last case its nearest existing parent is examined. A read-only directory is no fault: the checks
    that need to write are left out, and a finding says so. Raises CacheAccessError if the directory is none or
    cannot be read.
    """
    asked = Path(directory)
    place = _nearest_existing(asked)
    _check_readable(place)
    findings = []
    if place != asked:
        meaning = f"{asked} does not exist yet, so its nearest parent is examined."
        findings.append(Finding("directory", "ok", str(place), meaning))
    findings += [*_attempt("file system", file_system, place), *_attempt("directory mode", access, place)]
    return [*findings, *_written(place)]


def _nearest_existing(path: Path) -> Path:
    for candidate in (path, *path.absolute().parents):
        try:
            os.stat(candidate)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise _refused(candidate, error) from error
        return candidate
    return Path("/")


def _check_readable(place: Path) -> None:
    if not place.is_dir():
        raise CacheAccessError(f"{place} is not a directory, so no cache can be there: give a directory")
    try:
        with os.scandir(place) as entries:
            next(entries, None)
    except OSError as error:
        raise _refused(place, error) from error


def _refused(place: Path, error: OSError) -> CacheAccessError:
    return CacheAccessError(
        f"{place} cannot be read ({error.strerror or error}), so a cache there could not be used: "
        "ask its owner for read access (chmod g+rx), or check the mount"
    )


def _written(place: Path) -> list[Finding]:
    """The findings that need a file to be written."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".doctor-", dir=place))
    except OSError as error:
        meaning = (
            "You can read a cache here but not write one, and the checks that write are left out: for precompute, "
            "get write access."
        )
        return [Finding("writable", "warn", f"no ({error.strerror or error})", meaning)]
    findings = [Finding("writable", "ok", "yes", "You can write a cache here.")]
    findings += [*_attempt("free space", free_space, place), *_attempt("free inodes", free_inodes, place)]
    try:
        findings += _tried_together(folder)
        for name, trial in (("commit", tried_commit), ("clock", clock), ("file names", long_name)):
            findings += _attempt(name, trial, _fresh(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        meaning = "This temporary folder of the examination could not be removed: remove it by hand."
        findings.append(Finding("cleaning up", "warn", str(folder), meaning))
    return findings


def _tried_together(folder: Path) -> list[Finding]:
    try:
        with Partner() as partner:
            return [
                finding
                for trial in together.TRIALS
                for finding in _attempt(trial.__name__.replace("_", " "), trial, _fresh(folder), partner)
            ]
    except OSError as error:
        meaning = (
            "No second process could be started, so nothing that needs one was tried out: see the reason."
        )
        return [Finding("second process", "fail", str(error.strerror or error), meaning)]


def _fresh(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder))


def _attempt(name: str, trial: Callable[..., Finding | Iterable[Finding]], *arguments: Any) -> list[Finding]:
    """What a trial finds; a refusal of the operating system is a finding too."""
    findings: list[Finding] = []
    try:
        found = trial(*arguments)
        findings.extend([found] if isinstance(found, Finding) else found)
    except (OSError, ValueError, CacheAccessError, CommitError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        meaning = "The operating system refused an operation that a cache needs: see the reason."
        findings.append(Finding(name, "fail", reason, meaning))
    return findings

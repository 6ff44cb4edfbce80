"""A folder of generated files that knows its own contents, so that a second run changes nothing.

`SHA256SUMS` lists every file (`sha256sum -c SHA256SUMS` checks them). It is kept while writing, so that files of an
interrupted or older run are known and can be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path, PurePosixPath

from vggt_cache.errors import DataError

SUMS = "SHA256SUMS"
_MARK = "# vggt-cache demo data"
_END = "# complete"


class GeneratedFolder:
    """Files under `root` that `description`, which names the arguments, determines."""

    def __init__(self, root: Path, description: str) -> None:
        self.root = root
        self._header = f"{_MARK} {description}"
        self.digests: dict[str, str] = {}
        """Of the files that were put, by name: sha256 in hex."""

    def is_complete(self) -> bool:
        """Whether an earlier run with the same description left every file, and all are intact."""
        lines = self._lines()
        if not lines or lines[0] != self._header or lines[-1] != _END:
            return False
        return all(_digest(self.root / name) == digest for name, digest in _listed(lines).items())

    def begin(self) -> None:
        """Remove what an earlier run left. Raises DataError where the folder holds something else."""
        lines = self._lines()
        if lines is None and self.root.is_dir() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root} is not empty and holds no demo data, so writing there could mix with your own files: "
                "choose a new or empty directory"
            )
        for name in _listed(lines or []):
            (self.root / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for parent in PurePosixPath(name).parents[:-1]:
                    (self.root / parent).rmdir()
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / SUMS).write_text(f"{_MARK}, incomplete\n")

    def put(self, name: str, data: bytes, *, same_as: str | None = None) -> None:
        """Write a file, or link it to one that has the same bytes, where the file system has hard links."""
        digest = hashlib.sha256(data).hexdigest()
        with open(self.root / SUMS, "a", encoding="utf-8") as sums:
            sums.write(f"{digest}  {name}\n")
        self.digests[name] = digest
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        if same_as is not None:
            with contextlib.suppress(OSError):
                os.link(self.root / same_as, self.root / name)
                return
        (self.root / name).write_bytes(data)

    def end(self) -> None:
        """From now on the folder is complete."""
        lines = [self._header, *(f"{digest}  {name}" for name, digest in sorted(self.digests.items())), _END]
        temporary = self.root / f"{SUMS}.tmp"
        temporary.write_text("\n".join(lines) + "\n")
        temporary.replace(self.root / SUMS)

    def _lines(self) -> list[str] | None:
        """The lines of SHA256SUMS; None if there is none of ours."""
        try:
            text = (self.root / SUMS).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        return text.splitlines() if text.startswith(_MARK) else None


def _listed(lines: list[str]) -> dict[str, str]:
    """Digest by file name; names that lead out of the folder are left out."""
    listed = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        path = PurePosixPath(name)
        if separator and not line.startswith("#") and not path.is_absolute() and ".." not in path.parts:
            listed[name] = digest
    return listed


def _digest(path: Path) -> str | None:
    """sha256 of a file in hex; None if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None

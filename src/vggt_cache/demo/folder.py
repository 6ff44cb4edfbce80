"""A folder of generated files that knows its own contents, so that a second run changes nothing.

`SHA256SUMS` lists every file (`sha256sum -c SHA256SUMS` checks them). It is kept while writing, so that
files of an interrupted or older run are known and can be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path, PurePosixPath
from types import TracebackType

from vggt_cache.errors import DataError

SUMS = "SHA256SUMS"
_MARK = "# vggt-cache demo data"
_END = "# complete"


class GeneratedFolder:
    """Writes files under `root`. Use as a context manager; leaving it without an error completes the folder.

    `description` names the arguments that determine all files.
    """

    def __init__(self, root: Path, description: str) -> None:
        self.root = root
        self.sizes: dict[str, int] = {}
        """Bytes of each file by its name relative to the root."""
        self.written = 0
        """Files that were new or changed."""
        self._header = f"{_MARK} {description}"
        self._digests: dict[str, str] = {}
        self._before: dict[str, str] = {}

    def is_complete(self) -> bool:
        """Whether an earlier run with the same description left every file, and all are intact."""
        lines = self._lines()
        if not lines or lines[0] != self._header or lines[-1] != _END:
            return False
        listed = _parse(lines)
        if any(_digest(self.root / name) != digest for name, digest in listed.items()):
            return False
        self.sizes = {name: (self.root / name).stat().st_size for name in listed}
        return True

    def __enter__(self) -> GeneratedFolder:
        lines = self._lines()
        if lines is None and self.root.is_dir() and any(self.root.iterdir()):
            raise DataError(
                f"{self.root} is not empty and holds no demo data, so writing there could mix with your own files: "
                "choose a new or empty directory"
            )
        self._before = _parse(lines or [])
        self.root.mkdir(parents=True, exist_ok=True)
        if lines is None:
            self._replace(SUMS, f"{_MARK}, incomplete\n".encode())
        return self

    def put(self, name: str, data: bytes) -> None:
        """Write a file unless it is there with these bytes."""
        if self._note(name, hashlib.sha256(data).hexdigest(), len(data)):
            self._replace(name, data)

    def put_link(self, name: str, source: str) -> None:
        """Give a file that was `put` a second name; a copy where the file system has no hard links."""
        if not self._note(name, self._digests[source], self.sizes[source]):
            return
        target, temporary = self.root / name, _temporary(self.root / name)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.root / source, temporary)
            os.replace(temporary, target)
        except OSError:
            self._replace(name, (self.root / source).read_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            return
        for name in self._before.keys() - self._digests.keys():
            if _digest(self.root / name) == self._before[name]:
                self._remove(name)
        lines = [self._header, *(f"{digest}  {name}" for name, digest in sorted(self._digests.items())), _END]
        self._replace(SUMS, ("\n".join(lines) + "\n").encode())

    def _note(self, name: str, digest: str, size: int) -> bool:
        """Record a file; True if it has to be written."""
        self._digests[name] = digest
        self.sizes[name] = size
        if _digest(self.root / name) == digest:
            return False
        with open(self.root / SUMS, "a", encoding="utf-8") as sums:
            sums.write(f"{digest}  {name}\n")
        self.written += 1
        return True

    def _replace(self, name: str, data: bytes) -> None:
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _temporary(target).write_bytes(data)
        os.replace(_temporary(target), target)

    def _remove(self, name: str) -> None:
        """Remove a file of an earlier run, and its folders as far as they are empty then."""
        (self.root / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for parent in PurePosixPath(name).parents[:-1]:
                (self.root / parent).rmdir()

    def _lines(self) -> list[str] | None:
        """The lines of SHA256SUMS; None if there is none of ours."""
        try:
            text = (self.root / SUMS).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        return text.splitlines() if text.startswith(_MARK) else None


def _parse(lines: list[str]) -> dict[str, str]:
    """Digest by file name; names that lead out of the folder are left out."""
    listed = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        path = PurePosixPath(name)
        if separator and not line.startswith("#") and not path.is_absolute() and ".." not in path.parts:
            listed[name] = digest
    return listed


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _digest(path: Path) -> str | None:
    """sha256 of a file in hex; None if there is no such file."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None

"""Annotation files as UTF-8 text, however they are kept: as they are, packed by gzip, in UTF-16 or UTF-32.

What is not plain UTF-8 is a stream without places that could be looked up again; `HeldText` keeps what passes by.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from vggt_cache.errors import FileKindError
from vggt_cache.small_files import open_plain

HEAD_BYTES = 256 * 1024
"""Of a file's text, that can be looked at before it is read."""
MAX_HELD_BYTES = 2**30
"""Of one file's text, packed, in the memory of each process that reads samples by number."""
_PIECE_BYTES = 2**18
_GZIP = b"\x1f\x8b"
# What is no text becomes a lone surrogate, which is no UTF-8 either: only the records that hold it are lost.
codecs.register_error("vggt_cache_no_text", lambda error: ("\udc80", error.end))  # type: ignore[attr-defined]


def open_annotations(path: str) -> io.BufferedReader:
    """The UTF-8 text of a file; links are followed, pipes and devices are not waited for. Raises OSError.

    Only what is plain is `seekable`.
    """
    try:
        file: io.BufferedReader = open(open_plain(path), "rb", HEAD_BYTES)  # type: ignore[assignment]  # noqa: SIM115
    except FileKindError as error:
        raise OSError(errno.EINVAL, "not a plain file", path) from error
    begin = os.pread(file.fileno(), 4, 0)
    if begin.startswith(_GZIP):
        file = _stream(file, _gunzipped(file))
        begin = file.peek(4)[:4]
    encoding = json.detect_encoding(begin)
    marked = encoding in ("utf-16", "utf-32")
    if marked or (b"\0" in begin and begin.decode(encoding, "replace")[:1] in set("[{ \r\n\t")):
        file = _stream(file, _recoded(file, encoding))
    return file


def damage_of(file: io.BufferedReader) -> str:
    """Why the text ends where it does, if it should not."""
    return getattr(file.raw, "damage", "")


class HeldText:
    """A stream's text, kept in pieces that are packed one by one. It can be sent to other processes."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def keep(self, file: io.BufferedReader) -> io.BufferedReader:
        """The same text as `file`, which is kept as it is read."""
        return _stream(file, self._pass_on(file))

    def part(self, offset: int, length: int) -> bytes:
        first, last = offset // _PIECE_BYTES, (offset + length) // _PIECE_BYTES
        text = b"".join(map(zlib.decompress, self._pieces[first : last + 1]))
        return text[offset - first * _PIECE_BYTES :][:length]

    def _pass_on(self, file: io.BufferedReader) -> Iterator[bytes]:
        held_bytes = 0
        for piece in iter(partial(file.read, _PIECE_BYTES), b""):
            self._pieces.append(zlib.compress(piece, 1))
            held_bytes += len(self._pieces[-1])
            if held_bytes > MAX_HELD_BYTES:
                raise EOFError(f"over {MAX_HELD_BYTES} bytes packed: unpack it, or save it as UTF-8")
            yield piece
        if damage := damage_of(file):
            raise EOFError(damage)


class _Text(io.RawIOBase):
    """Text that is made while it is read. Where that fails it ends, and `damage` says why."""

    def __init__(self, file: io.BufferedReader, parts: Iterator[bytes]) -> None:
        self.damage = ""
        self._file, self._parts, self._rest = file, parts, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        filled = 0
        while filled < len(view) and (self._rest or self._read_on()):
            part = self._rest[: len(view) - filled]
            view[filled : filled + len(part)] = part
            self._rest = self._rest[len(part) :]
            filled += len(part)
        return filled

    def _read_on(self) -> bool:
        try:
            self._rest = next(part for part in self._parts if part)
        except StopIteration:
            return False
        except (EOFError, OSError, zlib.error) as error:
            self.damage = " ".join(str(error).split())
            return False
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _stream(file: io.BufferedReader, parts: Iterator[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Text(file, parts), HEAD_BYTES)


def _gunzipped(file: io.BufferedReader) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as packed:
        yield from iter(partial(packed.read1, _PIECE_BYTES), b"")


def _recoded(file: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("vggt_cache_no_text")
    for part in iter(partial(file.read, _PIECE_BYTES), b""):
        yield decoder.decode(part).encode("utf-8", "surrogatepass")
    yield decoder.decode(b"", True).encode("utf-8", "surrogatepass")
    if damage := damage_of(file):
        raise EOFError(damage)

"""The saved index: the table of all records in one file. Derived from the shards, so it may be lost at any time.

It is read whole when a cache is opened, and its one checksum is compared then, so a damaged index is never asked
anything. It is read with pread and never mapped: under mmap a truncated file would kill the process. docs/format.md
has it in bytes.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress

import numpy as np
import xxhash

from vggt_cache.store.atomic_file import replace_file
from vggt_cache.store.filesystem import FileSystem, read_bytes, read_fully, released_after
from vggt_cache.store.format import SHARD_NAME
from vggt_cache.store.record import ROW_BYTES, ROW_DTYPE, RecordTable

INDEX_FOLDER = "index"
INDEX_FILE = "rows"
MAGIC = b"vggt-idx"
VERSION = 3

_HEAD = struct.Struct("<8sIIQQ32s")  # magic, version, bytes per row, rows, shards, fingerprint
_CHECKSUM_BYTES = 16
_NAMES_AT = _HEAD.size + _CHECKSUM_BYTES
_NAME_BYTES = len("0123456789ab-0123456789abcdef.safetensors\n")
_PIECE_BYTES = 1024 * 1024
_MAX_BYTES = 1 << 34


class IndexFile:
    """The index of one store. Whatever keeps it from being read, the shards have all that it could tell."""

    def __init__(self, store_dir: str, fingerprint: str, fs: FileSystem) -> None:
        self._path = os.path.join(store_dir, INDEX_FOLDER)
        self._fingerprint = fingerprint
        self._fs = fs

    def load(self) -> RecordTable | None:
        """What it tells; None where there is none, or it is damaged, of another version or of another store."""
        with suppress(OSError, MemoryError), self._opened() as (fd, rows, shards):
            return self._read(fd, rows, shards)
        return None

    def shard_names(self) -> list[str]:
        """The shards that it names, its checksum not looked at: hints where to look beside a listing."""
        with suppress(OSError, MemoryError), self._opened() as (fd, _, shards):
            text = read_bytes(self._fs, fd, shards * _NAME_BYTES, _NAMES_AT)
            return list(filter(SHARD_NAME.fullmatch, text.decode("ascii", "replace").split("\n")))
        return []

    def save(self, table: RecordTable) -> None:
        """Replace it by one of this table, durably. Raises OSError."""
        with suppress(FileExistsError):
            self._fs.make_directory(self._path)
        with self._folder() as folder:
            replace_file(self._fs, folder, INDEX_FILE, index_bytes(table, self._fingerprint))

    def remove(self) -> None:
        """Give its room back, where the disk is full. Raises OSError."""
        with self._folder() as folder:
            self._fs.unlink(INDEX_FILE, dir_fd=folder)

    def file_bytes(self) -> int | None:
        """Its size; None where there is none."""
        with suppress(OSError), self._folder() as folder:
            return self._fs.stat(INDEX_FILE, dir_fd=folder).st_size
        return None

    def _folder(self) -> AbstractContextManager[int]:
        return released_after(self._fs, self._fs.open_directory(self._path, follow=False))

    @contextmanager
    def _opened(self) -> Iterator[tuple[int, int, int]]:
        """Descriptor, number of rows, number of shards. Raises OSError, also where it is no index that we can read."""
        with self._folder() as folder:
            fd = self._fs.open_file(INDEX_FILE, dir_fd=folder)
        with released_after(self._fs, fd):
            head = read_bytes(self._fs, fd, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
            magic, version, row_bytes, rows, shards, owner = _HEAD.unpack(head)
            ours = (magic, version, row_bytes, owner.hex()) == (MAGIC, VERSION, ROW_BYTES, self._fingerprint)
            size = _rows_at(shards) + rows * ROW_BYTES
            if not ours or not self._fs.fstat(fd).st_size == size <= _MAX_BYTES:
                raise OSError(errno.EBADMSG, "not an index of this store")
            yield fd, rows, shards

    def _read(self, fd: int, rows: int, shards: int) -> RecordTable | None:
        head = read_bytes(self._fs, fd, _rows_at(shards), 0)
        hasher = xxhash.xxh3_128(head[: _HEAD.size])
        hasher.update(head[_NAMES_AT:])
        table = np.empty(rows, ROW_DTYPE)
        memory = table.view(np.uint8).data
        for at in range(0, len(memory), _PIECE_BYTES):
            piece = memory[at : at + _PIECE_BYTES]
            if read_fully(self._fs, fd, piece, len(head) + at) < len(piece):
                return None
            hasher.update(piece)
        if hasher.digest() != head[_HEAD.size : _NAMES_AT]:
            return None
        names = head[_NAMES_AT : _NAMES_AT + shards * _NAME_BYTES].decode("ascii", "replace").split("\n")[:-1]
        # Its checksum protects from accidents and from nobody who means harm.
        sound = len(names) == shards and all(map(SHARD_NAME.fullmatch, names)) and names == sorted(set(names))
        sound = sound and int(table["shard"].max(initial=0)) < max(shards, 1)
        return RecordTable(names, table) if sound else None


def _rows_at(shards: int) -> int:
    return _NAMES_AT + -(-shards * _NAME_BYTES // 8) * 8


def index_bytes(table: RecordTable, fingerprint: str) -> tuple[bytes, memoryview]:
    """What stands in front of the rows, and the rows."""
    shards = len(table.shards)
    head = _HEAD.pack(MAGIC, VERSION, ROW_BYTES, len(table.rows), shards, bytes.fromhex(fingerprint))
    names = "".join(f"{name}\n" for name in table.shards).encode("ascii")
    names = names.ljust(_rows_at(shards) - _NAMES_AT, b"\0")
    rows = np.ascontiguousarray(table.rows).view(np.uint8).data
    hasher = xxhash.xxh3_128(head + names)
    hasher.update(rows)
    return head + hasher.digest() + names, rows

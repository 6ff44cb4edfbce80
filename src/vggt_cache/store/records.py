"""Reading one record: its length looked at, its bytes read and checked, and only then unpacked."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import xxhash

from vggt_cache.codec import NONE, codec_for, coded_form
from vggt_cache.codec.base import Codec
from vggt_cache.errors import CorruptRecordError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.faults import access_error
from vggt_cache.store.filesystem import FileSystem, read_fully
from vggt_cache.store.format import DTYPE_NAMES, finish_checksum, payload_bytes
from vggt_cache.store.open_shards import OpenShards
from vggt_cache.store.rows import Record
from vggt_cache.store.tensors import ReusedMemory

PIECE_BYTES = 4 * 1024 * 1024
"""Read and added to the checksum at a time: little enough that the checksum finds the bytes in the processor's last
cache, and so much that reader threads seldom meet at the interpreter's lock, which costs more than a slower cache."""


class RecordReader:
    """Reads from the open shards of one store. Safe to use from several threads and after fork."""

    def __init__(self, shards_dir: str, spec: FeatureSpec, pool: OpenShards, fs: FileSystem) -> None:
        self._path = shards_dir
        self._spec = spec
        self._pool = pool
        self._fs = fs
        self._codec = codec_for(coded_form(spec.feature_dtype))
        self._always_packed = spec.feature_dtype not in DTYPE_NAMES
        self._scratch = _Scratch()

    def read(self, shard: str, record: Record, memory_for: Callable[[Record], memoryview]) -> None:
        """See `ShardReader.read`."""
        codec = self._codec_of(record)
        if codec is None:
            self.read_stored(shard, record, lambda _: memory_for(record))
            return
        codec.prepare()
        stored = self.read_stored(shard, record, self._scratch.of)
        feature = memory_for(record)
        try:
            codec.decode(stored, feature, record.h * record.w, self._spec.encoder.channels)
        except ValueError as error:
            raise self._corrupt(shard, record, f"cannot be unpacked ({error})") from error

    def read_stored(self, shard: str, record: Record, memory_for: Callable[[int], memoryview]) -> memoryview:
        """See `ShardReader.read_stored`."""
        length = self._length(shard, record)
        opened = self._pool.take(shard)
        try:
            if record.offset + length > opened.file_bytes:
                raise self._corrupt(shard, record, "lies beyond the end of its file, which is truncated")
            target = memory_for(length)
            checksum = self._fill(opened.fd, target, record)
        except OSError as error:
            raise access_error(os.path.join(self._path, shard), error) from error
        finally:
            self._pool.give_back(opened)
        if checksum is None:
            raise self._corrupt(shard, record, "ends early: the file was truncated while it was read")
        if checksum != record.checksum:
            raise self._corrupt(shard, record, "does not match its checksum")
        return target

    def _codec_of(self, record: Record) -> Codec | None:
        return self._codec if record.stored_bytes or self._always_packed else None

    def _length(self, shard: str, record: Record) -> int:
        """Bytes of the record in its file. Where an index tells of a record, nobody has looked at them yet."""
        codec = self._codec_of(record)
        if codec is None:
            return payload_bytes(self._spec, record.h, record.w)
        least, most = codec.size_limits(record.h * record.w, self._spec.encoder.channels)
        if not least <= record.stored_bytes <= most:
            raise self._corrupt(
                shard, record, f"has a length that codec {codec.name} does not make of its shape"
            )
        return record.stored_bytes

    def _fill(self, fd: int, target: memoryview, record: Record) -> bytes | None:
        """Read the record; returns its checksum, or None where the file ends first. Raises OSError."""
        hasher = xxhash.xxh3_128()
        for at in range(0, len(target), PIECE_BYTES):
            piece = target[at : at + PIECE_BYTES]
            if read_fully(self._fs, fd, piece, record.offset + at) < len(piece):
                return None
            hasher.update(piece)
        codec = self._codec_of(record)
        name = NONE if codec is None else codec.name
        return finish_checksum(hasher, self._spec, record.key, record.h, record.w, name)

    def _corrupt(self, shard: str, record: Record, what: str) -> CorruptRecordError:
        cache_dir = os.path.dirname(os.path.dirname(self._path))
        return CorruptRecordError(
            f"record {record.key.hex()} in shard {shard} {what}, so it was damaged after it was written: run "
            f"`vggt-cache prune {cache_dir} --damaged --yes`, then precompute again"
        )


class _Scratch(ReusedMemory, threading.local):
    """Each thread's memory for packed records."""

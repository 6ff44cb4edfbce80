"""Rewriting a store's shards with another codec, shard by shard, each record proved before the old shard goes.

Shards are taken oldest first. A record's newer copy, which is the one that is served, then lies in a shard
that was not touched yet; so whatever moment this is killed at, every key is served as before, and the next
call goes on with the shards that still have another codec.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from vggt_cache.codec import codec_for, shard_codec
from vggt_cache.errors import CommitError, CorruptRecordError, ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem
from vggt_cache.store.format import payload_bytes
from vggt_cache.store.reader import SHARDS_FOLDER, ShardReader, ShardVanishedError
from vggt_cache.store.removal import remove_file, renew_index, scan_durably
from vggt_cache.store.rows import Record, Rows, key_groups, unpack_rows
from vggt_cache.store.scan import RecordChecker, Scan, scan_store
from vggt_cache.store.tensors import ReusedMemory
from vggt_cache.store.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class Converted:
    """One shard of another codec, and what became of it, or in a dry run would."""

    shard: str
    """Its name."""
    records: int
    """That are served from it, and move. The others have newer copies."""
    bytes_before: int
    bytes_after: int = 0
    """0 in a dry run, which packs nothing."""
    problem: str = ""
    """Why it was kept as it is."""


def convert(
    cache_dir: str | os.PathLike[str],
    spec: FeatureSpec,
    codec: str,
    *,
    dry_run: bool = True,
    fs: FileSystem = OPERATING_SYSTEM,
) -> Iterator[Converted]:
    """Rewrite the shards of one store whose codec is another; yields each when it is done.

    A new shard is written, each record is read back from its file, unpacked and compared, the shard is committed,
    and read once more under its name; then the old one is removed. A shard with damaged records, or with older
    copies of damaged ones, is kept. Damaged and foreign shards are left alone.

    As with `prune`, a process that has the cache open and meets a removed shard gets a CacheAccessError that tells
    it to refresh. Raises SettingsError, CacheAccessError, CommitError.
    """
    packed = codec_for(shard_codec(spec.feature_dtype, codec))
    if packed is not None:
        packed.prepare()
    converter = _Converter(os.path.abspath(cache_dir), spec, codec, fs)
    try:
        yield from converter.run(dry_run)
    finally:
        converter.close()


class _Converter:
    """Works on one store."""

    def __init__(self, cache_dir: str, spec: FeatureSpec, codec: str, fs: FileSystem) -> None:
        self._cache_dir = cache_dir
        self._store_dir = os.path.join(cache_dir, spec.short_name)
        self._spec = spec
        self._codec = shard_codec(spec.feature_dtype, codec)
        self._fs = fs
        self._reader = ShardReader(self._store_dir, spec, fs=fs)
        self._checker = RecordChecker(self._reader)
        self._value = ReusedMemory()
        self._proof = ReusedMemory()

    def close(self) -> None:
        self._reader.close()

    def run(self, dry_run: bool) -> Iterator[Converted]:
        scan = scan_store(self._reader) if dry_run else scan_durably(self._reader, self._store_dir)
        served, removed = scan.served, False
        winners = np.flatnonzero(served)[key_groups(scan.rows)]
        for number, codec in enumerate(scan.codecs):
            if codec == self._codec:
                continue
            mine = scan.rows["shard"] == number
            records = [record for _, record in unpack_rows(scan.rows[mine & served])]
            outcome = Converted(
                shard=scan.names[number], records=len(records), bytes_before=scan.file_bytes[number]
            )
            if not dry_run:
                in_order = sorted(records, key=lambda record: record.offset)
                outcome = self._attempt(outcome, in_order, scan, scan.rows[winners[mine & ~served]])
                removed = removed or not outcome.problem
            yield outcome
        if removed:
            renew_index(self._cache_dir, self._spec, self._fs)

    def _attempt(self, outcome: Converted, records: list[Record], scan: Scan, newer: Rows) -> Converted:
        """`newer`: what is served in the place of the shard's other records."""
        try:
            self._require_intact(scan, newer)
            size = self._rewrite(outcome.shard, records) if records else 0
        except (CorruptRecordError, ShardFormatError) as error:
            return replace(outcome, records=0, problem=str(error))
        except ShardVanishedError:
            return replace(outcome, records=0, problem="another process is changing this store")
        remove_file(os.path.join(self._store_dir, SHARDS_FOLDER), outcome.shard, self._fs)
        return replace(outcome, bytes_after=size)

    def _require_intact(self, scan: Scan, newer: Rows) -> None:
        """The older copy of a damaged record is what `prune --damaged` would bring back, so it must stay."""
        for shard, record in unpack_rows(newer):
            self._reader.read_stored(scan.names[shard], record, self._value.of)

    # ------------------------------------------------------------ one shard

    def _rewrite(self, shard: str, records: list[Record]) -> int:
        """Commit these records of a shard to a new one; returns its size in bytes."""
        with ShardWriter(
            self._store_dir, self._spec, max_records=len(records), codec=self._codec, fs=self._fs
        ) as writer:
            written = [self._copy(writer, shard, record) for record in records]
            name = writer.commit()
        self._prove(name, written)
        status = self._reader.status(name)
        return status.st_size if status is not None else 0

    def _copy(self, writer: ShardWriter, shard: str, record: Record) -> Record:
        """Write one record, and see that what is in the file unpacks to the same bytes."""
        self._reader.read(shard, record, self._memory_for)
        value = self._memory_for(record)
        writer.append_payload(record.key, record.h, record.w, value)
        copy, stored = writer.read_back(record.key)
        if self._unpacked(copy, stored) != value:
            raise CommitError(
                f"record {record.key.hex()} of shard {shard} does not come back from codec {self._codec} as it was, so "
                "nothing was changed: examine memory and disk of this machine (vggt-cache doctor)"
            )
        return copy

    def _unpacked(self, record: Record, stored: bytes) -> memoryview:
        codec = codec_for(self._codec)
        if codec is None:
            return memoryview(stored)
        proof = self._proof.of(payload_bytes(self._spec, record.h, record.w))
        try:
            codec.decode(memoryview(stored), proof, record.h * record.w, self._spec.encoder.channels)
        except ValueError:
            return memoryview(b"")
        return proof

    def _prove(self, name: str, written: list[Record]) -> None:
        """See that the committed shard says and holds what was written; else take it back."""
        try:
            intact = self._reader.header(name).records == written and all(
                self._checker.payload(name, record) is not None for record in written
            )
        except (CorruptRecordError, ShardFormatError):
            intact = False
        if not intact:
            remove_file(os.path.join(self._store_dir, SHARDS_FOLDER), name, self._fs)
            raise CommitError(
                f"shard {name} was committed and does not read back as it was written, so it was removed again and the "
                "old one kept: examine this disk (vggt-cache doctor)"
            )

    def _memory_for(self, record: Record) -> memoryview:
        return self._value.of(payload_bytes(self._spec, record.h, record.w))

"""Removing what no reader can get, repairing shards with damaged records, and rewriting shards with another codec.

A shard is never changed: what is needed of it is committed to a new one, proved, named in the index, and only then the
old one goes. Whatever moment this is killed at, every key is served as before, and the next call goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vggt_cache.codec import NONE, codec_for, coded_form, shard_codec
from vggt_cache.errors import CommitError, CorruptRecordError, ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.directory import survey
from vggt_cache.store.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    access_error,
    commit_error,
    opened_directory,
    sync_directory,
)
from vggt_cache.store.inventory import (
    TEMP_MIN_AGE_S,
    Inventory,
    RecordChecker,
    dead_temp_files,
    take_inventory,
)
from vggt_cache.store.record import Record, Rows, key_groups, payload_bytes, stored_length, unpack_rows
from vggt_cache.store.shards import SHARDS_FOLDER, ReusedMemory, ShardFolder, ShardVanishedError
from vggt_cache.store.snapshot import SnapshotTaker
from vggt_cache.store.writer import ShardWriter

WAITING_BYTES = 4 * 1024**3
"""Shards of so many bytes that were rewritten are removed together, since the index is saved before they are."""


# ---------------------------------------------------------------- what all of it shares


class _StoreKeeper:
    """Works on one store."""

    def __init__(self, cache_dir: str, spec: FeatureSpec, fs: FileSystem, *, dry_run: bool) -> None:
        self.store_dir = os.path.join(cache_dir, spec.short_name)
        self.shards_dir = os.path.join(self.store_dir, SHARDS_FOLDER)
        self.dry_run = dry_run
        self.spec = spec
        self.fs = fs
        self.shards = ShardFolder(self.store_dir, spec, fs=fs)
        self.checker = RecordChecker(self.shards)
        self._taker = SnapshotTaker(self.store_dir, spec, self.shards)
        self._known: set[str] = set()
        """Shards that were there, or made, since this began."""
        self._value = ReusedMemory()
        self._proof = ReusedMemory()

    def close(self) -> None:
        self.shards.close()

    def inventory(self) -> Inventory:
        """What is there. Raises CacheAccessError."""
        found = take_inventory(self.shards)
        self._known.update(shard.name for shard in found.shards)
        return found

    # ------------------------------------------------------------ removing

    def remove_shards(self, names: Sequence[str]) -> None:
        """Remove shards of which nothing is needed any more.

        First the index names what takes their place, and before that the disk knows these names: a reader that lists
        the folder meanwhile may see neither, and a power loss must not take both. Raises CommitError, CacheAccessError.
        """
        if names and not self.dry_run:
            try:
                self._save_index()
            except OSError as error:
                raise commit_error(self.store_dir, error) from error
            for name in names:
                self.remove_file(self.shards_dir, name)

    def _save_index(self) -> None:
        snapshot = self._taker.take(known_names=self._known)
        try:
            self._taker.save_or_raise(snapshot)
        except OSError:
            # A full disk may have room where the old one was. As long as there is none, the headers are read.
            with suppress(OSError):
                self._taker.index.remove()
            self._taker.save_or_raise(snapshot)

    def forget_removed(self) -> None:
        """Save an index without them. Nothing depends on it. Raises CacheAccessError."""
        self._taker.save(self._taker.take())

    def remove_file(self, folder: str, name: str) -> None:
        """Remove a file, durably; it may be gone already. Raises CacheAccessError."""
        if self.dry_run:
            return
        try:
            with opened_directory(self.fs, folder, follow=True) as dir_fd:
                self.fs.unlink(name, dir_fd=dir_fd)
                sync_directory(self.fs, dir_fd)
        except FileNotFoundError:
            pass  # another process was quicker
        except OSError as error:
            raise access_error(os.path.join(folder, name), error) from error

    # ------------------------------------------------------------ rewriting

    def rewrite(self, shard: str, records: Sequence[Record], codec: str) -> int:
        """Commit these records of a shard to a new one with this codec; returns its size in bytes.

        Each is read back from the file, unpacked and compared, and read once more when the shard has its name.
        Raises CorruptRecordError where one of them is damaged, ShardVanishedError, CommitError, CacheAccessError.
        """
        with ShardWriter(
            self.store_dir, self.spec, max_records=len(records), codec=codec, fs=self.fs
        ) as writer:
            in_order = sorted(records, key=lambda record: record.offset)
            written = [self._copy(writer, shard, record, codec) for record in in_order]
            name = writer.commit()
        self._known.add(name)
        self._prove(name, written)
        return self.shards.file_bytes(name) or 0

    def _copy(self, writer: ShardWriter, shard: str, record: Record, codec: str) -> Record:
        """Write one record, and see that what is in the file unpacks to the same bytes."""
        packed = record.stored_bytes > 0
        if packed == (
            shard_codec(self.spec.feature_dtype, codec) != NONE
        ):  # there is one codec for each dtype
            value = self.checker.stored(shard, record)
            writer.append_stored(record.key, record.h, record.w, value)
            copy, stored = writer.read_back(record.key)
            same = memoryview(stored) == value
        else:
            value = self._value.of(payload_bytes(self.spec, record.h, record.w))
            with self.shards.opened(shard) as opened:
                opened.read(record, value)
            writer.append_payload(record.key, record.h, record.w, value)
            copy, stored = writer.read_back(record.key)
            same = self._unpacked(copy, stored, codec) == value
        if not same:
            raise CommitError(
                f"record {record.key.hex()} of shard {shard} is changed by codec {codec}, so "
                "nothing was changed: examine memory and disk of this machine (vggt-cache doctor)"
            )
        return copy

    def _unpacked(self, record: Record, stored: bytes, codec: str) -> memoryview:
        proof = self._proof.of(payload_bytes(self.spec, record.h, record.w))
        decoder = codec_for(codec, self.spec.feature_dtype)
        try:
            decoder.decode(memoryview(stored), proof, record.h * record.w, self.spec.encoder.channels)
        except ValueError:
            return memoryview(b"")
        return proof

    def _prove(self, name: str, written: list[Record]) -> None:
        """See that the committed shard says and holds what was written; else take it back."""
        try:
            intact = self.shards.header(name).records == written and all(
                self.checker.is_intact(name, record) for record in written
            )
        except ShardFormatError:
            intact = False
        if not intact:
            self.remove_file(self.shards_dir, name)
            raise CommitError(
                f"shard {name} was committed and does not read back as it was written, so it was removed again and the "
                "old one kept: examine this disk (vggt-cache doctor)"
            )


# ---------------------------------------------------------------- prune


@dataclass(frozen=True, kw_only=True)
class PruneAction:
    """One file that was removed, or in a dry run would be."""

    path: str
    bytes: int
    """Disk space that this frees."""
    reason: str


def prune(
    cache_dir: str | os.PathLike[str],
    *,
    dry_run: bool = True,
    damaged: bool = False,
    min_age_s: float = TEMP_MIN_AGE_S,
    fs: FileSystem = OPERATING_SYSTEM,
) -> list[PruneAction]:
    """Remove what is provably unreachable from all stores of a cache directory; returns what was done.

    - temporary files that have no living writer and were not written to for `min_age_s` seconds
    - shards of which every record is superseded by one in a later shard that was just read and found intact
    - with `damaged`: shards with a damaged header or damaged records, whose intact records are first committed to a
      new shard. This reads every record of the cache.

    Never removed: shards of another format version or another specification, links, and files of other names.
    A process that has the cache open and meets a removed shard gets a CacheAccessError that tells it to
    refresh. Raises CacheNotFoundError, NotACacheError, CacheAccessError, CommitError.
    """
    path = os.path.abspath(cache_dir)
    actions: list[PruneAction] = []
    for spec in survey(path, fs).specs:
        pruner = _Pruner(_StoreKeeper(path, spec, fs, dry_run=dry_run))
        try:
            actions += pruner.run(damaged=damaged, min_age_s=min_age_s)
        finally:
            pruner.keeper.close()
    return actions


class _Pruner:
    def __init__(self, keeper: _StoreKeeper) -> None:
        self.keeper = keeper
        self._gone: set[str] = set()

    def run(self, *, damaged: bool, min_age_s: float) -> Iterator[PruneAction]:
        keeper = self.keeper
        for folder, name, size in dead_temp_files(keeper.store_dir, min_age_s, keeper.fs):
            keeper.remove_file(folder, name)
            yield PruneAction(
                path=os.path.join(folder, name), bytes=size, reason="a temporary file whose writer is gone"
            )
        if damaged:
            yield from self._repair(keeper.inventory())
        yield from self._remove(list(self._superseded(keeper.inventory())))
        if self._gone and not keeper.dry_run:
            keeper.forget_removed()

    def _remove(self, actions: list[PruneAction]) -> list[PruneAction]:
        names = [os.path.basename(action.path) for action in actions]
        self.keeper.remove_shards(names)
        self._gone.update(names)
        return actions

    def _repair(self, found: Inventory) -> Iterator[PruneAction]:
        intact = self.keeper.checker.intact(found)
        kept = _first_intact_of_each_key(found, intact)
        spoilt = set(np.unique(found.rows["shard"][~intact]).tolist())
        spoilt.update(
            number for number, shard in enumerate(found.shards) if shard.problem and not shard.foreign
        )
        # Latest first: a record that an older shard does not keep is in a sound shard by the time that one goes.
        for number in sorted(spoilt, reverse=True):
            shard, mine = found.shards[number], found.rows["shard"] == number
            bad = int((mine & ~intact).sum())
            reason = shard.problem or f"{bad} of its records are damaged"
            records = [record for _, record in unpack_rows(found.rows[mine & kept])]
            try:
                yield from self._remove([self._moved(shard.name, shard.file_bytes, records, reason)])
            except (CorruptRecordError, ShardFormatError):
                return  # worse by now: this one and those that rely on it stay for another time

    def _moved(self, name: str, size: int, records: list[Record], reason: str) -> PruneAction:
        """Commit the intact records that are served from this shard to a new one; the old one can go."""
        keeper = self.keeper
        kept_bytes = sum(stored_length(keeper.spec, record) for record in records)
        if records and not keeper.dry_run:
            packed = any(record.stored_bytes for record in records)
            keeper.rewrite(name, records, coded_form(keeper.spec.feature_dtype) if packed else NONE)
        moves = f"the {len(records)} others move to a new shard" if records else "no other is needed"
        path = os.path.join(keeper.shards_dir, name)
        return PruneAction(path=path, bytes=max(0, size - kept_bytes), reason=f"{reason}; {moves}")

    def _superseded(self, found: Inventory) -> Iterator[PruneAction]:
        groups, shards = key_groups(found.rows), found.rows["shard"]
        served = np.flatnonzero(found.served)
        for number in found.superseded_shards():
            shard = found.shards[number]
            winners = found.rows[served[groups[shards == number]]]
            if shard.name not in self._gone and self._all_sound(found, winners):
                path = os.path.join(self.keeper.shards_dir, shard.name)
                reason = "later shards hold all of its records, intact"
                yield PruneAction(path=path, bytes=shard.file_bytes, reason=reason)

    def _all_sound(self, found: Inventory, rows: Rows) -> bool:
        return all(
            not found.shards[shard].problem
            and self.keeper.checker.is_intact(found.shards[shard].name, record)
            for shard, record in unpack_rows(rows)
        )


def _first_intact_of_each_key(found: Inventory, intact: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """For each row whether it is what would be served if no damaged record existed."""
    positions = np.flatnonzero(intact)
    _, first = np.unique(key_groups(found.rows)[positions], return_index=True)
    kept = np.zeros(len(found.rows), np.bool_)
    kept[positions[first]] = True
    return kept


# ---------------------------------------------------------------- convert


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
    """Rewrite the shards of one store whose codec is another; yields each when its successor is committed.

    Shards are taken oldest first, so a record's newer copy, which is the one that is served, lies in a shard that was
    not touched yet. The old ones are removed a few at a time. A shard with damaged records, or with older copies of
    damaged ones, is kept. Damaged and foreign shards are left alone.

    As with `prune`, a process that has the cache open and meets a removed shard gets a CacheAccessError that tells
    it to refresh. Raises SettingsError, CacheAccessError, CommitError.
    """
    wanted = shard_codec(spec.feature_dtype, codec)
    codec_for(wanted, spec.feature_dtype).prepare()
    keeper = _StoreKeeper(os.path.abspath(cache_dir), spec, fs, dry_run=dry_run)
    try:
        yield from _converted(keeper, wanted, codec)
    finally:
        keeper.close()


def _converted(keeper: _StoreKeeper, wanted: str, codec: str) -> Iterator[Converted]:
    found = keeper.inventory()
    served, removed, waiting = found.served, False, dict[str, int]()
    winners = np.flatnonzero(served)[key_groups(found.rows)]
    try:
        for number, shard in enumerate(found.shards):
            if shard.codec == wanted or shard.problem:
                continue
            mine = found.rows["shard"] == number
            records = [record for _, record in unpack_rows(found.rows[mine & served])]
            outcome = Converted(shard=shard.name, records=len(records), bytes_before=shard.file_bytes)
            if not keeper.dry_run:
                outcome = _convert_one(
                    keeper, outcome, records, codec, found, found.rows[winners[mine & ~served]]
                )
                if not outcome.problem:
                    waiting[shard.name] = shard.file_bytes
            yield outcome
            if sum(waiting.values()) > WAITING_BYTES:
                keeper.remove_shards(list(waiting))
                removed, waiting = True, {}
    finally:
        keeper.remove_shards(list(waiting))
        if removed or waiting:
            keeper.forget_removed()


def _convert_one(
    keeper: _StoreKeeper, outcome: Converted, records: list[Record], codec: str, found: Inventory, newer: Rows
) -> Converted:
    """`newer`: what is served in the place of the shard's other records."""
    try:
        # The older copy of a damaged record is what `prune --damaged` would bring back, so it must stay.
        for shard, record in unpack_rows(newer):
            if found.shards[shard].problem:
                raise CorruptRecordError(
                    f"newer copies are in a damaged shard: {found.shards[shard].problem}"
                )
            keeper.checker.stored(found.shards[shard].name, record)
        size = keeper.rewrite(outcome.shard, records, codec) if records else 0
    except (CorruptRecordError, ShardFormatError) as error:
        return replace(outcome, records=0, problem=str(error))
    except ShardVanishedError:
        return replace(outcome, records=0, problem="another process is changing this store")
    return replace(outcome, bytes_after=size)

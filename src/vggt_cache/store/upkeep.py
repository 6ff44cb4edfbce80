"""Removing what no reader can get, repairing shards with damaged records, and rewriting shards with another codec.

A shard is never changed: what is needed of it is committed to a new one, proved, named in the index, and only then the
old one goes. Whenever this is killed, every key is served as before, and the next call goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vggt_cache.codec import NONE, codec_for, coded_form, shard_codec
from vggt_cache.errors import CacheAccessError, CommitError, CorruptRecordError, ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.place import absolute
from vggt_cache.store.atomic_file import TEMP_NAME
from vggt_cache.store.directory import CLAIMS_FOLDER, SPEC_FILE, survey
from vggt_cache.store.filesystem import (
    OPERATING_SYSTEM,
    FileSystem,
    accessing,
    committing,
    released_after,
    sync_directory,
)
from vggt_cache.store.format import SHARD_NAME
from vggt_cache.store.index import INDEX_FILE, INDEX_FOLDER
from vggt_cache.store.inventory import TEMP_MIN_AGE_S, Inventory, dead_temp_files, take_inventory
from vggt_cache.store.object_store import system_of
from vggt_cache.store.record import Record, begins_key, cells_of, payload_bytes, stored_length, unpack_rows
from vggt_cache.store.shards import SHARDS_FOLDER, ReusedMemory, ShardFolder, ShardVanishedError
from vggt_cache.store.snapshot import SnapshotTaker
from vggt_cache.store.writer import ShardWriter

WAITING_BYTES = 4 * 1024**3
"""Shards of so many bytes that were rewritten are removed together, since the index is saved before they are."""


# ---------------------------------------------------------------- what all of it shares


class _StoreKeeper:
    """Works on one store."""

    def __init__(self, cache_dir: str, spec: FeatureSpec, fs: FileSystem, *, dry_run: bool) -> None:
        fs = system_of(cache_dir, fs)
        self.store_dir = os.path.join(cache_dir, spec.short_name)
        self.dry_run, self.spec, self.fs = dry_run, spec, fs
        self.shards = ShardFolder(self.store_dir, spec, fs=fs)
        self.gone: set[str] = set()
        """Shards that were removed, or in a dry run would be."""
        self._taker = SnapshotTaker(self.store_dir, spec, self.shards)
        self._known: set[str] = set()
        """Shards that were there, or made, since this began."""
        self._value, self._proof = ReusedMemory(), ReusedMemory()

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
        self.gone.update(names)
        if names and not self.dry_run:
            with committing(self.store_dir):
                self._save_index()
            for name in names:
                self.remove_file(self.shards.path, name)

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
        if self.gone and not self.dry_run:
            self._taker.save(self._taker.take())

    def remove_file(self, folder: str, name: str) -> None:
        """Remove a file, durably; it may be gone already. Raises CacheAccessError."""
        if self.dry_run:
            return
        with (
            accessing(os.path.join(folder, name)),
            suppress(FileNotFoundError),  # another process was quicker
            released_after(self.fs, self.fs.open_directory(folder)) as dir_fd,
        ):
            self.fs.unlink(name, dir_fd=dir_fd)
            sync_directory(self.fs, dir_fd)

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
        return self._proved_bytes(name, written)

    def _copy(self, writer: ShardWriter, shard: str, record: Record, codec: str) -> Record:
        """Write one record, and see that what is in the file unpacks to the same bytes."""
        payload = payload_bytes(self.spec, record.h, record.w, record.frames)
        # There is one codec for each dtype, so that a packed record needs no other packing.
        as_it_is = (record.stored_bytes > 0) == (shard_codec(self.spec.feature_dtype, codec) != NONE)
        with self.shards.opened(shard) as opened:
            if as_it_is:
                value = opened.stored(record)
                writer.append_stored(record.key, record.h, record.w, value, record.frames)
            else:
                value = self._value.of(payload)
                opened.read(record, value)
                writer.append_payload(record.key, record.h, record.w, value, record.frames)
        copy, stored = writer.read_back(record.key)
        proof = memoryview(stored)
        if not as_it_is:
            proof = self._proof.of(payload)
            decoder = codec_for(codec, self.spec.feature_dtype)
            try:
                cells = cells_of(self.spec, copy.h, copy.w, copy.frames)
                decoder.decode(memoryview(stored), proof, cells, self.spec.encoder.channels)
            except ValueError:
                proof = memoryview(b"")
        if proof != value:
            raise CommitError(
                f"record {record.key.hex()} of shard {shard} is changed by codec {codec}, so "
                "nothing was changed: examine memory and disk of this machine (vggt-cache doctor)"
            )
        return copy

    def _proved_bytes(self, name: str, written: list[Record]) -> int:
        """The size of a committed shard that says and holds what was written; any other one is taken back."""
        with suppress(ShardFormatError):
            header = self.shards.header(name)
            if header.records == written and all(self.shards.is_intact(name, record) for record in written):
                return header.data_end
        self.remove_file(self.shards.path, name)
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
    path = absolute(cache_dir)
    fs = system_of(path, fs)
    actions: list[PruneAction] = []
    for spec in survey(path, fs)[0]:
        keeper = _StoreKeeper(path, spec, fs, dry_run=dry_run)
        with closing(keeper.shards):
            for folder, name, size in dead_temp_files(keeper.store_dir, min_age_s, fs):
                keeper.remove_file(folder, name)
                reason = "a temporary file whose writer is gone"
                actions.append(PruneAction(path=os.path.join(folder, name), bytes=size, reason=reason))
            if damaged:
                actions += _repair(keeper, keeper.inventory())
            actions += _remove_superseded(keeper, keeper.inventory())
            keeper.forget_removed()
    return actions


_PATTERNS = (
    TEMP_NAME.pattern,
    SHARD_NAME.pattern,
    INDEX_FILE,
    re.escape(SPEC_FILE),
    r"[0-9a-f]{32}\.\d{1,9}",
)
_STORE_FILE = re.compile("|".join(f"(?:{pattern})" for pattern in _PATTERNS))
"""What a store is made of; the last one are claims, which only save work."""


def remove_store(
    cache_dir: str | os.PathLike[str],
    spec: FeatureSpec,
    *,
    dry_run: bool = True,
    fs: FileSystem = OPERATING_SYSTEM,
) -> list[PruneAction]:
    """Remove one specification with all its features; returns what was done.

    Shards go first and the specification last: killed in between, this leaves a smaller store, and the next call goes
    on. Files of other names stay, and with them the folder. A process that reads from it gets a CacheAccessError.
    Raises CacheAccessError, also where a writer is at work.
    """
    keeper = _StoreKeeper(absolute(cache_dir), spec, fs, dry_run=dry_run)
    actions, store_dir, fs = [], keeper.store_dir, keeper.fs
    dead = {(folder, name) for folder, name, _ in dead_temp_files(store_dir, 0.0, fs)}
    names = (CLAIMS_FOLDER, SHARDS_FOLDER, INDEX_FOLDER)
    folders = [*(os.path.join(store_dir, name) for name in names), store_dir]
    with closing(keeper.shards):
        for folder, name, size in _files_of(folders, fs):
            if TEMP_NAME.fullmatch(name) and (folder, name) not in dead:
                raise CacheAccessError(
                    f"{folder}/{name} is being written by another process, so {spec.short_name} was not removed, or "
                    "not all of it: wait until it has ended, and run this again"
                )
            keeper.remove_file(folder, name)
            path = os.path.join(folder, name)
            actions.append(PruneAction(path=path, bytes=size, reason="its specification is removed"))
    for folder in [] if dry_run else folders:
        with suppress(OSError):
            fs.remove_directory(folder)
    return actions


def _files_of(folders: Sequence[str], fs: FileSystem) -> Iterator[tuple[str, str, int]]:
    """Folder, name and bytes of what a store is made of; what is still being written comes first."""
    found = []
    for folder in folders:
        with (
            accessing(folder),
            suppress(FileNotFoundError),
            released_after(fs, fs.open_directory(folder)) as dir_fd,
        ):
            for name in sorted(fs.list_names(dir_fd)):
                if _STORE_FILE.fullmatch(name):
                    found.append((folder, name, fs.stat(name, dir_fd=dir_fd).st_size))
    yield from sorted(found, key=lambda file: not TEMP_NAME.fullmatch(file[1]))


def _repair(keeper: _StoreKeeper, found: Inventory) -> Iterator[PruneAction]:
    intact = _intact_rows(keeper.shards, found)
    # Of each key the copy that would be served if no damaged record existed.
    kept = np.flatnonzero(intact)
    kept = kept[begins_key(found.rows[kept])]
    spoilt = set(np.unique(found.rows["shard"][~intact]).tolist())
    spoilt.update(number for number, shard in enumerate(found.shards) if shard.problem and not shard.foreign)
    # Latest first: a record that an older shard does not keep is in a sound shard by the time that one goes.
    for number in sorted(spoilt, reverse=True):
        shard, bad = found.shards[number], int((found.rows["shard"][~intact] == number).sum())
        records = [record for _, record in unpack_rows(found.rows[kept[found.rows["shard"][kept] == number]])]
        if records and not keeper.dry_run:
            packed = any(record.stored_bytes for record in records)
            try:
                keeper.rewrite(shard.name, records, coded_form(keeper.spec.feature_dtype) if packed else NONE)
            except (CorruptRecordError, ShardFormatError):
                return  # worse by now: this one and those that rely on it stay for another time
        keeper.remove_shards([shard.name])
        moves = f"the {len(records)} others move to a new shard" if records else "no other is needed"
        kept_bytes = sum(stored_length(keeper.spec, record) for record in records)
        yield PruneAction(
            path=os.path.join(keeper.shards.path, shard.name),
            bytes=max(0, shard.file_bytes - kept_bytes),
            reason=f"{shard.problem or f'{bad} of its records are damaged'}; {moves}",
        )


def _intact_rows(shards: ShardFolder, found: Inventory) -> npt.NDArray[np.bool_]:
    """For each row whether its record is intact. Reads the whole store, shard by shard."""
    intact = np.zeros(len(found.rows), np.bool_)
    order = np.lexsort((found.rows["offset"], found.rows["shard"]))
    for position, (shard, record) in zip(order, unpack_rows(found.rows[order]), strict=True):
        intact[position] = shards.is_intact(found.shards[shard].name, record)
    return intact


def _remove_superseded(keeper: _StoreKeeper, found: Inventory) -> list[PruneAction]:
    shards = []
    for number in found.superseded_shards():
        winners = found.rows[found.winners[found.rows["shard"] == number]]
        if found.shards[number].name not in keeper.gone and all(
            not found.shards[newer].problem and keeper.shards.is_intact(found.shards[newer].name, record)
            for newer, record in unpack_rows(winners)
        ):
            shards.append(found.shards[number])
    keeper.remove_shards([shard.name for shard in shards])
    reason = "later shards hold all of its records, intact"
    return [
        PruneAction(path=os.path.join(keeper.shards.path, shard.name), bytes=shard.file_bytes, reason=reason)
        for shard in shards
    ]


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
    keeper = _StoreKeeper(absolute(cache_dir), spec, fs, dry_run=dry_run)
    with closing(keeper.shards):
        found, waiting = keeper.inventory(), dict[str, int]()
        try:
            for number, shard in enumerate(found.shards):
                if shard.codec == wanted or shard.problem:
                    continue
                outcome = _convert_one(keeper, found, number, codec)
                if not dry_run and not outcome.problem:
                    waiting[shard.name] = shard.file_bytes
                yield outcome
                if sum(waiting.values()) > WAITING_BYTES:
                    keeper.remove_shards(list(waiting))
                    waiting = {}
        finally:
            keeper.remove_shards(list(waiting))
            keeper.forget_removed()


def _convert_one(keeper: _StoreKeeper, found: Inventory, number: int, codec: str) -> Converted:
    shard, mine = found.shards[number], found.rows["shard"] == number
    records = [record for _, record in unpack_rows(found.rows[mine & found.served])]
    outcome = Converted(shard=shard.name, records=len(records), bytes_before=shard.file_bytes)
    if keeper.dry_run:
        return outcome
    try:
        # The older copy of a damaged record is what `prune --damaged` would bring back, so it must stay.
        for newer, record in unpack_rows(found.rows[found.winners[mine & ~found.served]]):
            if found.shards[newer].problem:
                raise CorruptRecordError(
                    f"newer copies are in a damaged shard: {found.shards[newer].problem}"
                )
            with keeper.shards.opened(found.shards[newer].name) as opened:
                opened.stored(record)
        size = keeper.rewrite(shard.name, records, codec) if records else 0
    except (CorruptRecordError, ShardFormatError) as error:
        return replace(outcome, records=0, problem=str(error))
    except ShardVanishedError:
        return replace(outcome, records=0, problem="another process is changing this store")
    return replace(outcome, bytes_after=size)

"""Reading shards: their names, their headers and their records, through a bounded number of open files."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple, NoReturn, TypeVar

import numpy as np
import xxhash

from vggt_cache.codec import DTYPE_NAMES, NONE, codec_for, coded_form
from vggt_cache.codec.base import Codec
from vggt_cache.errors import CacheAccessError, CorruptRecordError, SettingsError, ShardFormatError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.direct import is_in_blocks, read_around, read_blocks
from vggt_cache.store.filesystem import (
    FileSystem,
    access_error,
    accessing,
    is_regular,
    probe,
    read_bytes,
    read_fully,
    release,
    released_after,
    sync_directory,
)
from vggt_cache.store.format import ALIGNMENT_BYTES, LENGTH_BYTES, MAX_HEADER_BYTES, SHARD_NAME
from vggt_cache.store.header import (
    ForeignShardError,
    ShardHeader,
    UnknownFormatError,
    header_length,
    parse_header,
    rescue_records,
)
from vggt_cache.store.record import Record, Rows, cells_of, finish_checksum, join_rows, make_rows

T = TypeVar("T")

SHARDS_FOLDER = "shards"
PIECE_BYTES = 4 * 1024 * 1024
"""Read and added to the checksum at a time: little enough that the checksum finds the bytes in the processor's last
cache, and so much that reader threads seldom meet at the interpreter's lock, which costs more than a slower cache."""
MAX_OPEN = 64
"""How many shards are kept open beyond those in use."""
_FIRST_READ_BYTES = 64 * 1024
"""Covers the whole header of a shard of the default size."""
_RECORDS_PROVED = 4
"""Of a shard with a damaged header, so many records are read at most to find out where its data begin."""


class ShardVanishedError(CacheAccessError):
    """A shard of the snapshot is no longer there: removed by `prune` or by hand."""


class ShardEntry(NamedTuple):
    """A shard, without its records."""

    name: str
    file_bytes: int
    codec: str = NONE
    """What packed its records."""
    problem: str = ""
    """Why its header cannot be used."""
    foreign: bool = False
    """Intact as far as we can tell, but not ours: of another version or store, or not a plain file."""


class OpenShard:
    """An open shard, or their folder: to be used in a `with` statement. `users` counts who needs it, also the pool."""

    __slots__ = ("_folder", "direct_fd", "fd", "file_bytes", "name", "users")

    def __init__(
        self, folder: ShardFolder, name: str, fd: int, file_bytes: int, *, direct_fd: int | None = None
    ) -> None:
        """`direct_fd`: the same file, for reads past the page cache."""
        self._folder, self.name, self.fd, self.file_bytes, self.users = folder, name, fd, file_bytes, 1
        self.direct_fd = direct_fd

    def __enter__(self) -> OpenShard:
        return self

    def __exit__(self, *error: object) -> None:
        self._folder.pool.give_back(self)

    def close(self) -> None:
        """Nobody uses it any more."""
        for fd in (self.fd, self.direct_fd):
            if fd is not None:
                release(self._folder.fs, fd)

    def stored_bytes(self, record: Record) -> int:
        """Bytes of the record in the file. Raises CorruptRecordError for what cannot be: an index may be wrong."""
        codec = self._folder.codec_of(record)
        least, most = codec.size_limits(self._cells(record), self._folder.spec.encoder.channels)
        length = record.stored_bytes or (least if codec.name == NONE else 0)
        if not least <= length <= most:
            self._corrupt(record, f"has a length that codec {codec.name} does not make of its shape")
        if record.offset + length > self.file_bytes:
            self._corrupt(record, "lies beyond the end of its file, which is truncated")
        return length

    def read(self, record: Record, feature: memoryview) -> None:
        """Fill `feature`, which has the size of the feature, from the record: checked, then unpacked.

        Raises CorruptRecordError, CacheAccessError, and SettingsError for unwritable memory or a missing package.
        """
        codec = self._folder.codec_of(record)
        if codec.name == NONE:
            self.read_stored(record, feature)
            return
        codec.prepare()
        stored = self.stored(record)
        self._probe(feature)
        try:
            codec.decode(stored, feature, self._cells(record), self._folder.spec.encoder.channels)
        except ValueError as error:
            self._corrupt(record, f"cannot be unpacked ({error})", error)

    def stored(self, record: Record) -> memoryview:
        """The record as it lies in the file, checked; valid until this thread's next call. Errors as for `read`."""
        return self.read_stored(record, self._folder.scratch.of(self.stored_bytes(record)))

    def read_stored(self, record: Record, memory: memoryview) -> memoryview:
        """The same in `memory`, of `stored_bytes` bytes, which is returned."""
        if self._folder.direct and self.direct_fd is not None:
            # What is wrong is read again through the page cache before it is called damaged: bytes that go past it
            # can miss this process's memory where it forks meanwhile (O_DIRECT in open(2)).
            with suppress(CorruptRecordError):
                return self._read_checked(record, memory, self._fill_direct)
        return self._read_checked(record, memory, self._fill)

    def _read_checked(
        self, record: Record, memory: memoryview, fill: Callable[[memoryview, int], int]
    ) -> memoryview:
        hasher = xxhash.xxh3_128()
        step = len(memory) if self._folder.fs.reads_whole else PIECE_BYTES
        for at in range(0, len(memory), step):
            piece = memory[at : at + step]
            if fill(piece, record.offset + at) < len(piece):
                self._corrupt(record, "ends early: the file was truncated while it was read")
            hasher.update(piece)
        codec = self._folder.codec_of(record).name
        sides = record.h, record.w
        checksum = finish_checksum(hasher, self._folder.spec, record.key, *sides, codec, record.frames)
        if checksum != record.checksum:
            self._corrupt(record, "does not match its checksum")
        if self._folder.on_read is not None:
            self._folder.on_read(record, memory)
        return memory

    def _cells(self, record: Record) -> int:
        return cells_of(self._folder.spec, record.h, record.w, record.frames)

    def _fill(
        self, memory: memoryview, offset: int, read: Callable[..., int] = read_fully, fd: int | None = None
    ) -> int:
        try:
            return read(self._folder.fs, self.fd if fd is None else fd, memory, offset)
        except OSError as error:
            if error.errno == errno.EFAULT:
                raise SettingsError(
                    "out lies in memory that cannot be written, such as a file mapped for reading: give a tensor with "
                    "memory of its own, or none"
                ) from error
            raise _refusal(os.path.join(self._folder.path, self.name), error) from error

    def _fill_direct(self, memory: memoryview, offset: int) -> int:
        """The same past the page cache; through it where the file system took the flag and refuses the read."""
        read: Callable[..., int] = read_blocks
        if not is_in_blocks(memory, offset):
            self._probe(memory)
            read = partial(read_around, scratch=self._folder.blocks.of)
        try:
            done = self._fill(memory, offset, read, self.direct_fd)
        except CacheAccessError as error:
            if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.EINVAL:
                raise
            self._folder.read_buffered(error.__cause__)
            done = 0
        return done + (self._fill(memory[done:], offset + done) if done < len(memory) else 0)

    def _probe(self, memory: memoryview) -> None:
        """The system refuses memory at which a copy or a decoder would crash. Writes into its first and last bytes."""
        self._fill(memory[:1], 0, probe)
        self._fill(memory[(len(memory) - 1) // 64 * 64 :][:1], 0, probe)

    def _corrupt(self, record: Record, what: str, cause: Exception | None = None) -> NoReturn:
        cache_dir = os.path.dirname(os.path.dirname(self._folder.path))
        raise CorruptRecordError(
            f"record {record.key.hex()} in shard {self.name} {what}, so it was damaged after it was written: run "
            f"`vggt-cache prune {cache_dir} --damaged --yes`, then precompute again"
        ) from cause


class ShardFolder:
    """The shards of one store. Safe to use from several threads, and after `pool.start_anew_in_child` in a fork."""

    def __init__(self, store_dir: str, spec: FeatureSpec, *, fs: FileSystem) -> None:
        """Raises CacheAccessError."""
        self.path = os.path.join(store_dir, SHARDS_FOLDER)
        self.spec, self.fs = spec, fs
        self.pool, self.scratch, self.blocks = OpenShards(fs), _Scratch(), _Scratch()
        self.on_read: Callable[[Record, memoryview], None] | None = None
        """Called with each record that was read and checked, and its bytes in the file, which are its to read alone."""
        self.direct = self.must_be_direct = False
        """Whether records are read past the page cache, and whether the user is told where they cannot be."""
        self._packed = codec_for(coded_form(spec.feature_dtype), spec.feature_dtype)
        always_packed = spec.feature_dtype not in DTYPE_NAMES
        self._plain = self._packed if always_packed else codec_for(NONE, spec.feature_dtype)
        self._directory: OpenShard | None = None
        self.reopen()

    def close(self) -> None:
        """Close all files; those that are being read follow when the read has ended."""
        self.pool.close()
        self._set_directory(None)

    def require_open(self) -> None:
        if self.pool.closed:
            store_dir = os.path.dirname(self.path)
            raise CacheAccessError(f"the cache {store_dir} was closed: open it again to read from it")

    def codec_of(self, record: Record) -> Codec:
        return self._packed if record.stored_bytes else self._plain

    # ------------------------------------------------------------ names

    def reopen(self) -> None:
        """Follow the path anew: the folder may have been made since, or removed and made again.

        Where nothing is there by now, the folder that was open stays: it was moved. Raises CacheAccessError.
        """
        with accessing(self.path):
            try:
                fd = self._with_room(lambda: self.fs.open_directory(self.path, follow=False))
            except FileNotFoundError:
                return
        self._set_directory(OpenShard(self, "", fd, 0))
        if self.pool.closed:  # meanwhile
            self._set_directory(None)

    def _set_directory(self, new: OpenShard | None) -> None:
        old, self._directory = self._directory, new
        if old is not None:
            self.pool.give_back(old)

    def _in_directory(self, call: Callable[[int], T]) -> T:
        """What `call` makes of a handle of the folder. Raises FileNotFoundError where there is none, and OSError."""
        while (directory := self._directory) is not None:
            if self.pool.hold(directory):  # else `reopen` has just replaced it
                with directory as held:
                    return self._with_room(lambda: call(held.fd))
        self.require_open()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    def names(self) -> list[str]:
        """Names of all committed shards, in order, as one listing shows them. Raises CacheAccessError."""
        if self._directory is None:
            return []
        with accessing(self.path):
            found = self._in_directory(self.fs.list_names)
        return sorted(filter(SHARD_NAME.fullmatch, found))

    def sync_names(self) -> None:
        """Make all names of the folder durable, also those that another process gave. Raises OSError."""
        if self._directory is not None:
            self._in_directory(lambda dir_fd: sync_directory(self.fs, dir_fd))

    def exists(self, name: str) -> bool:
        """Whether there is a plain file of this name. Raises CacheAccessError."""
        with accessing(os.path.join(self.path, name)):
            try:
                return is_regular(self._in_directory(lambda dir_fd: self.fs.stat(name, dir_fd=dir_fd)))
            except FileNotFoundError:
                return False

    # ------------------------------------------------------------ headers

    def header(self, name: str) -> ShardHeader:
        """Parse a shard's header. Raises ShardFormatError, ShardVanishedError or CacheAccessError."""
        with self._opened_alone(name) as shard:
            return self._header(shard)

    def _header(self, shard: OpenShard) -> ShardHeader:
        with _accessing_shard(os.path.join(self.path, shard.name)):
            header = parse_header(read_header_bytes(self.fs, shard.fd, shard.name), shard.name)
        if header.spec != self.spec:
            raise ForeignShardError(
                f"shard {shard.name} belongs to another store ({header.spec.short_name}): move it there"
            )
        return header

    def read_headers(self, names: Iterable[str]) -> tuple[list[ShardEntry], Rows]:
        """What the shards hold, without those that are gone; `shard` counts in the entries. Raises CacheAccessError."""
        entries: list[ShardEntry] = []
        parts: list[Rows] = []
        for name in names:
            with suppress(ShardVanishedError):
                entry, rows = self.contents(name)
                rows["shard"] = len(entries)
                entries.append(entry)
                parts.append(rows)
        return entries, join_rows(parts)

    def contents(self, name: str) -> tuple[ShardEntry, Rows]:
        """What a shard holds. If its header is damaged, the records whose own part of it is intact; `shard` is 0.

        Raises ShardVanishedError or CacheAccessError.
        """
        try:
            with self._opened_alone(name) as shard:
                try:
                    header = self._header(shard)
                except ShardFormatError as error:
                    return self._remains(shard, error)
                return ShardEntry(name, shard.file_bytes, header.codec), header.rows
        except ForeignShardError as error:  # not a plain file
            return ShardEntry(name, 0, problem=str(error), foreign=True), make_rows([])

    def _remains(self, shard: OpenShard, error: ShardFormatError) -> tuple[ShardEntry, Rows]:
        unknown, foreign = isinstance(error, UnknownFormatError), isinstance(error, ForeignShardError)
        records: list[Record] = []
        if unknown or not foreign:
            # A record that matches a checksum of this version was written in it: later ones take another.
            records = self._rescued(shard, naming=self.spec.fingerprint if unknown else "")
        codec = coded_form(self.spec.feature_dtype) if any(r.stored_bytes for r in records) else NONE
        foreign = foreign and not records
        return ShardEntry(shard.name, shard.file_bytes, codec, str(error), foreign), make_rows(records)

    def _rescued(self, shard: OpenShard, naming: str) -> list[Record]:
        """What is left of a damaged header that has the text `naming`. A sound record proves where the data begin."""
        with _accessing_shard(os.path.join(self.path, shard.name)):
            remains = read_bytes(self.fs, shard.fd, LENGTH_BYTES + MAX_HEADER_BYTES, 0)
        if naming.encode() in remains:
            for records in rescue_records(remains, shard.file_bytes, self.spec):
                if any(self.is_intact(shard.name, record) for record in records[:_RECORDS_PROVED]):
                    return records
        return []

    # ------------------------------------------------------------ records

    def is_intact(self, name: str, record: Record) -> bool:
        """Raises CacheAccessError."""
        try:
            with self.opened(name) as shard:
                shard.stored(record)
        except (CorruptRecordError, ShardFormatError):
            return False
        return True

    def opened(self, name: str) -> OpenShard:
        """The shard, open until the end of the `with` statement that this is for.

        Raises ShardVanishedError, ShardFormatError, CacheAccessError.
        """
        shared = self.pool.take(name)
        if shared is None:
            self.require_open()
            fd, file_bytes = self._open(name)
            shared = self.pool.add(OpenShard(self, name, fd, file_bytes, direct_fd=self._reopened(fd)))
        return shared

    def _reopened(self, fd: int) -> int | None:
        """The same file for reads past the page cache, where these are wanted and can be had."""
        if not self.direct:
            return None
        try:
            return self._with_room(lambda: self.fs.reopen_direct(fd))
        except OSError as error:
            self.read_buffered(error)
            return None

    def read_buffered(self, error: OSError) -> None:
        """Records are read through the page cache from now on: the system refuses to read them past it."""
        told, self.direct, self.must_be_direct = not self.must_be_direct, False, False
        if not told:
            warnings.warn(
                f"{self.path} cannot be read past the page cache ({error.strerror}), so it is read through it, as "
                "with io=buffered: leave io at auto, or put the cache on a file system with O_DIRECT",
                stacklevel=2,
            )

    @contextmanager
    def _opened_alone(self, name: str) -> Iterator[OpenShard]:
        """The same, not kept open: one of many whose header is read once."""
        fd, file_bytes = self._open(name)
        with released_after(self.fs, fd):
            yield OpenShard(self, name, fd, file_bytes)

    def _open(self, name: str) -> tuple[int, int]:
        with _accessing_shard(os.path.join(self.path, name)):
            return self._in_directory(lambda dir_fd: open_regular(self.fs, name, dir_fd))

    def _with_room(self, call: Callable[[], T]) -> T:
        """The call's result. Where descriptors run out, shards that nobody is reading are closed, and it goes on."""
        while True:
            seen = self.pool.releases
            try:
                return call()
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self.pool.release_idle(seen):
                    raise


def _refusal(path: str, error: OSError) -> CacheAccessError:
    """A shard that is gone may be told when it is opened, or, in a bucket or over NFS (ESTALE), when it is read."""
    if error.errno in (errno.ENOENT, errno.ESTALE):
        return ShardVanishedError(
            f"{path} is no longer there, although this process has seen it: it was removed, by `vggt-cache prune` or "
            "by hand; open the cache again, or call refresh()"
        )
    return access_error(path, error)


@contextmanager
def _accessing_shard(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(path, error) from error


def open_regular(fs: FileSystem, name: str, dir_fd: int) -> tuple[int, int]:
    """Descriptor and size in bytes of a plain file. Raises ForeignShardError for anything else, or OSError."""
    refusal = ForeignShardError(f"{name} cannot be read: it is not a plain file; put the file itself there")
    try:
        fd = fs.open_file(name, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise refusal from error
        raise
    try:
        status = fs.fstat(fd)
        if not is_regular(status):
            raise refusal
    except BaseException:
        release(fs, fd)
        raise
    return fd, status.st_size


def read_header_bytes(fs: FileSystem, fd: int, name: str) -> bytes:
    """Length field and header. Raises ShardFormatError for an impossible length, or OSError."""
    data = read_bytes(fs, fd, _FIRST_READ_BYTES, 0)
    missing = LENGTH_BYTES + header_length(data, name) - len(data)
    return data + read_bytes(fs, fd, missing, len(data)) if missing > 0 else data


# ---------------------------------------------------------------- what is kept open


class OpenShards:
    """Open shards, least recently used first. One in use is never closed, or its number could be another's."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs, self.limit, self.closed = fs, MAX_OPEN, False
        self._forget()

    def _forget(self) -> None:
        self.lock = threading.Lock()
        self._shards: OrderedDict[str, OpenShard] = OrderedDict()
        self.releases = 0
        """How often `release_idle` has closed something."""

    def take(self, name: str) -> OpenShard | None:
        """The shard, if it is open; it stays so until `give_back`."""
        with self.lock:
            if (shared := self._shards.get(name)) is not None:
                self._shards.move_to_end(name)
                shared.users += 1
            return shared

    def add(self, opened: OpenShard) -> OpenShard:
        """Keep a shard that was just opened; returns it, or the same one that another thread opened before."""
        with suppress(OSError):  # a hint, and no more
            self._fs.expect_scattered_reads(opened.fd)
        with self.lock:
            if self.closed:  # meanwhile
                return opened
            shared = self._shards.setdefault(opened.name, opened)
            shared.users += 1
            idle = self._pop_idle(len(self._shards) - self.limit)
        self._release(idle if shared is opened else [*idle, opened])
        return shared

    def hold(self, opened: OpenShard) -> bool:
        """Keep it open until `give_back`; False where it is closed already."""
        with self.lock:
            opened.users += opened.users > 0
            return opened.users > 0

    def give_back(self, shard: OpenShard) -> None:
        """Close it as soon as nobody uses it any more."""
        with self.lock:
            shard.users -= 1
            unused = shard.users == 0
        if unused:
            shard.close()

    def forget(self, name: str) -> None:
        """Open it anew when it is needed again."""
        with self.lock:
            shard = self._shards.pop(name, None)
        if shard is not None:
            self.give_back(shard)

    def _pop_idle(self, count: int) -> list[OpenShard]:
        names = [name for name, shared in self._shards.items() if shared.users == 1][: max(0, count)]
        return [self._shards.pop(name) for name in names]

    def _release(self, shards: list[OpenShard]) -> None:
        for shared in shards:
            shared.close()

    def release_idle(self, seen: int) -> bool:
        """Close what is not in use, because descriptors ran out after `seen` releases; from now on keep fewer.

        False: nothing was closed since then, nor can be.
        """
        with self.lock:
            if self.releases != seen:
                return True  # another thread was quicker, and has closed all that was idle
            self.limit = max(1, min(self.limit, len(self._shards) // 2))
            idle = self._pop_idle(len(self._shards))
            self._release(idle)
            self.releases += bool(idle)
        return bool(idle)

    def close(self) -> None:
        """Those that are in use are closed as soon as they are not."""
        with self.lock:
            self.closed = True
            shards, self._shards = self._shards, OrderedDict()
        for shared in shards.values():
            self.give_back(shared)

    def start_anew_in_child(self) -> None:
        """After fork: a lock may be held, and a shard in use, by a thread that does not exist here."""
        shards = list(self._shards.values())
        self._forget()
        self._release(shards)


class ReusedMemory:
    """Bytes that are used again and again, grown as needed: fresh memory costs a page fault each 4 KiB.

    They start at a page, as reads past the page cache need, and as records do: some processors copy several times more
    slowly to a place that lies 1 to 31 bytes further in its page than the source.
    """

    def __init__(self) -> None:
        self._bytes = memoryview(b"")

    def of(self, length: int) -> memoryview:
        """Memory of so many bytes, of any content, valid until the next call."""
        if len(self._bytes) < length:
            memory = np.empty(length + ALIGNMENT_BYTES - 1, np.uint8)
            start = -memory.ctypes.data % ALIGNMENT_BYTES
            self._bytes = memory[start : start + length].data
        return self._bytes[:length]


class _Scratch(ReusedMemory, threading.local):
    """Each thread's memory for packed records."""

"""Writing a shard: records go to the disk as they come, the header last, then the commit."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from vggt_cache.codec import NONE, codec_for, shard_codec
from vggt_cache.environment import size_of
from vggt_cache.errors import SettingsError, SpecMismatchError
from vggt_cache.identity import KEY_BYTES, FeatureSpec
from vggt_cache.store.atomic_file import PendingFile
from vggt_cache.store.filesystem import OPERATING_SYSTEM, FileSystem, committing, release
from vggt_cache.store.format import (
    MAX_RECORDS,
    MAX_SIDE,
    MAX_STORED_BYTES,
    SHARD_NAME,
    build_header,
    reserved_header_bytes,
)
from vggt_cache.store.object_store import system_of
from vggt_cache.store.record import Record, cells_of, payload_bytes, record_checksum, sides_of, stored_length
from vggt_cache.store.shards import SHARDS_FOLDER

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
DEFAULT_MAX_RECORDS = 256
DEFAULT_SHARD_BYTES = 256 * 1024 * 1024
_LAST_INSTANT_MS = 2**48 - 1


def shard_bytes() -> int:
    """How large a shard grows, as the environment's VGGT_CACHE_SHARD_BYTES says. Raises SettingsError."""
    return size_of("VGGT_CACHE_SHARD_BYTES", DEFAULT_SHARD_BYTES)


class ShardWriter:
    """One shard being written. Nothing of it can be read before `commit` has returned its name.

    For one thread of one process. Leaving it as a context manager without `commit` aborts. After a CommitError
    the shard is gone; start a new one.
    """

    def __init__(
        self,
        store_dir: str | os.PathLike[str],
        spec: FeatureSpec,
        *,
        max_records: int = DEFAULT_MAX_RECORDS,
        codec: str = NONE,
        fs: FileSystem = OPERATING_SYSTEM,
    ) -> None:
        """`store_dir` is what `create_store` returned for `spec`; `codec`: `none` or `lossless`.

        Raises CommitError, or SettingsError for a codec that does not fit or whose package is missing.
        """
        if not 1 <= max_records <= MAX_RECORDS:
            raise SettingsError(f"max_records is {max_records}: a shard holds 1 to {MAX_RECORDS} records")
        if os.path.basename(os.path.normpath(store_dir)) != spec.short_name:
            raise SpecMismatchError(
                f"{os.fspath(store_dir)} is not the store of this specification, which is {spec.short_name}: "
                "use the path that create_store returns"
            )
        fs = system_of(store_dir, fs)
        self._fs, self._spec, self._max_records = fs, spec, max_records
        self._codec_name = shard_codec(spec.feature_dtype, codec)
        self._codec = codec_for(self._codec_name, spec.feature_dtype)
        self._codec.prepare()
        self._shards_dir = os.path.join(store_dir, SHARDS_FOLDER)
        self._data_start = self._end = reserved_header_bytes(spec, max_records, self._codec_name)
        self._records: dict[bytes, Record] = {}
        self.opened_s = fs.clock_s()
        """When this shard was begun, seconds since 1970."""
        with committing(self._shards_dir):
            self._dir_fd = fs.open_directory(self._shards_dir, follow=False)
            try:
                self._file: PendingFile | None = PendingFile(fs, self._dir_fd)
            except BaseException:
                release(fs, self._dir_fd)
                raise

    @property
    def record_count(self) -> int:
        return len(self._records)

    @property
    def bytes_written(self) -> int:
        """Bytes of records so far, as they lie in the file."""
        return self._end - self._data_start

    @property
    def file_bytes(self) -> int:
        """Bytes of the file so far, with the place that is kept for its header."""
        return self._end

    @property
    def is_full(self) -> bool:
        """Whether the header has no place for another record."""
        return len(self._records) >= self._max_records

    def append(self, key: bytes, feature: torch.Tensor) -> None:
        """Write one feature (FeatureSpec.shape), on the CPU, in the specification's dtype, under its 16-byte key.

        Raises SettingsError for anything else or a key that this shard has already, and CommitError, which
        ends the shard, where the system does not take the bytes.
        """
        from vggt_cache.store.tensors import readable_bytes

        (h, w, frames), payload = readable_bytes(feature, self._spec)
        self.append_payload(key, h, w, payload, frames)

    def append_record(self, key: bytes, shape: Sequence[int], record: torch.Tensor) -> None:
        """The same for a feature of this shape that the specification's codec has packed, uint8 [bytes]."""
        from vggt_cache.store.tensors import bytes_of

        h, w, frames = sides_of(self._spec, shape)
        self.append_stored(key, h, w, bytes_of(record), frames)

    def append_payload(self, key: bytes, h: int, w: int, payload: memoryview, frames: int = 0) -> None:
        """The same from the feature's bytes, row-major and little-endian."""
        self._check_record(key, h, w, frames)
        if payload.nbytes != payload_bytes(self._spec, h, w, frames):
            raise _no_feature(payload, h, w)
        cells = cells_of(self._spec, h, w, frames)
        self.append_stored(key, h, w, self._codec.encode(payload, cells, self._spec.encoder.channels), frames)

    def append_stored(self, key: bytes, h: int, w: int, stored: memoryview, frames: int = 0) -> None:
        """The same from the bytes as they lie in a shard of the same codec."""
        self._check_record(key, h, w, frames)
        packed = self._codec_name != NONE
        least, most = self._codec.size_limits(cells_of(self._spec, h, w, frames), self._spec.encoder.channels)
        if not least <= stored.nbytes <= (min(most, MAX_STORED_BYTES) if packed else most):
            raise _no_feature(stored, h, w)
        checksum = record_checksum(self._spec, key, h, w, stored, self._codec_name, frames)
        record = Record(key, self._end, h, w, checksum, stored.nbytes if packed else 0, frames)
        self._attempt(lambda file: file.write(stored, record.offset))
        self._records[key] = record
        self._end += stored.nbytes

    def read_back(self, key: bytes) -> tuple[Record, bytes]:
        """A record of this shard and its bytes, read from the file. Raises CommitError where that cannot be done."""
        record = self._records[key]
        return record, self._attempt(lambda file: file.read(stored_length(self._spec, record), record.offset))

    def commit(self) -> str:
        """Bring the shard to the disk and give it its final name, which is returned.

        When this has returned, the shard survives a kill at any point, and a power loss where the disk honours
        fsync. Raises CommitError; then nothing of it is visible. Raises SettingsError for an empty shard.
        """
        self._require_open()
        if not self._records:
            self.abort()
            raise SettingsError("this shard has no records, so there is nothing to commit: call abort")
        name = self._attempt(self._commit)
        release(self._fs, self._dir_fd)
        self._file = None
        return name

    def abort(self) -> None:
        """Forget the shard: its temporary file is removed. Does nothing after `commit` or `abort`."""
        file, self._file = self._file, None
        if file is not None:
            file.discard()
            release(self._fs, self._dir_fd)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    def _attempt(self, step: Callable[[PendingFile], T]) -> T:
        """Do one step of writing; whatever goes wrong in it ends the shard."""
        with committing(self._shards_dir):
            try:
                return step(self._require_open())
            except BaseException:
                self.abort()
                raise

    def _require_open(self) -> PendingFile:
        if self._file is None:
            raise SettingsError("this shard was committed or aborted: start a new ShardWriter")
        return self._file

    def _commit(self, file: PendingFile) -> str:
        records = list(self._records.values())
        file.write(build_header(self._spec, records, self._data_start, self._codec_name), 0)
        file.seal(read_only=True)
        name = next_shard_name(self._fs.list_names(self._dir_fd), self._fs.clock_s())
        file.publish_new(name)
        return name

    def _check_record(self, key: bytes, h: int, w: int, frames: int) -> None:
        self._require_open()
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise SettingsError(f"{key!r} is no key: a key has {KEY_BYTES} bytes")
        if key in self._records:
            raise SettingsError(f"key {key.hex()} is in this shard already: a shard holds a feature once")
        if self.is_full:
            raise SettingsError(
                f"this shard has {len(self._records)} records, which is all it can hold: commit it"
            )
        if not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE and frames <= MAX_SIDE):
            raise SettingsError(
                f"a feature of {h} x {w} patches cannot be: sides are 1 to {MAX_SIDE} patches"
            )


def _no_feature(data: memoryview, h: int, w: int) -> SettingsError:
    return SettingsError(f"{data.nbytes} bytes are no feature of {h} x {w} patches in this specification")


def next_shard_name(names: Iterable[str], now_s: float) -> str:
    """A name that sorts behind all of `names`, whatever the clock says.

    Of two shards with the same key the later name wins: a recomputed feature must not lose to a slow clock.
    """
    latest_ms = max((int(name[:12], 16) for name in names if SHARD_NAME.fullmatch(name)), default=-1)
    instant_ms = min(max(int(now_s * 1000), latest_ms + 1, 0), _LAST_INSTANT_MS)
    return f"{instant_ms:012x}-{secrets.token_hex(8)}.safetensors"

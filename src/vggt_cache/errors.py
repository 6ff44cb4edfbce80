"""Every refusal has a name here. The message is the one sentence that the user sees.

A message says what is wrong (with the value), what that means, and what to do. The command line prints
it without a traceback and exits with `exit_code`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager


class VggtCacheError(Exception):
    """Base of all errors that a user can cause or cure."""

    exit_code = 1


class SettingsError(VggtCacheError):
    """Flags or arguments that are unknown, out of range, or contradict each other."""

    exit_code = 2


class DataError(VggtCacheError):
    """The data root or an annotation file cannot be used."""

    exit_code = 2


class CheckpointError(VggtCacheError):
    """The encoder's checkpoint is absent, unsafe, incomplete or of another architecture."""

    exit_code = 2


class FrameError(VggtCacheError):
    """One image file cannot be read or decoded, or is over a limit; the run goes on without it."""


class OutOfMemoryError(VggtCacheError):
    """The device cannot hold even a batch of one."""


class EngineError(VggtCacheError):
    """Processes of a cluster do not start, or end again and again."""


class NotFiniteError(VggtCacheError):
    """Training has come to a loss, a gradient or a weight that is no finite number."""


class SmallFileError(VggtCacheError):
    """A small file cannot be read or written. `reason` is the sentence without the path in front."""

    exit_code = 2

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[object, ...]:  # that of Exception would give one argument
        return type(self), (self.path, self.reason)


class FileAbsentError(SmallFileError):
    """There is none."""


class FileKindError(SmallFileError):
    """A link, folder, pipe, socket or device stands where a plain file, or a folder of our own, is expected."""


class FileTooLargeError(SmallFileError):
    """It has more bytes than any such file has."""


class FileTextError(SmallFileError):
    """Its bytes are no UTF-8 text."""


class FileAccessError(SmallFileError):
    """The operating system refuses: permission, a full disk, a mount that is read-only or gone."""


class StoreError(VggtCacheError):
    """Base of everything a store can report."""


class CacheNotFoundError(StoreError):
    """The cache directory does not exist."""

    exit_code = 2


class NotACacheError(StoreError):
    """The directory exists and holds no feature cache."""

    exit_code = 2


class AmbiguousCacheError(StoreError):
    """Several encoder specs share the directory, and the caller did not say which one is meant."""

    exit_code = 2


class SpecMismatchError(StoreError):
    """The cache was made with another encoder, context, preprocessing or dtype than the one asked for."""

    exit_code = 2


class CacheAccessError(StoreError):
    """The operating system refuses to read or write the cache (permission, I/O error, stale mount)."""

    exit_code = 2


class MissingFeatureError(StoreError):
    """A feature is asked for that is not in the cache, and may not be left out."""


class ShardFormatError(StoreError):
    """A shard's header is not what the format allows: truncated, hostile, or of another version."""


class CorruptRecordError(StoreError):
    """A record's bytes do not match its checksum."""


class CommitError(StoreError):
    """Writing, syncing or publishing a shard failed; nothing of it was committed."""

    exit_code = 2


class DiskSpaceError(StoreError):
    """There is not enough free space for what was asked."""

    exit_code = 2


def require_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Raises SettingsError."""
    if value not in allowed:
        raise SettingsError(
            f"{name} is {value!r}, which is not one of {', '.join(map(str, allowed))}: choose one of these"
        )


def os_errors_as(kind: type[VggtCacheError], fault: str, rest: str) -> AbstractContextManager[None]:
    """As `errors_as`, of what the operating system refuses."""
    return errors_as(kind, fault, rest, OSError)


@contextmanager
def errors_as(kind: type[VggtCacheError], fault: str, rest: str, *caught: type[Exception]) -> Iterator[None]:
    """Raise what is `caught` as `kind` instead: the fault, the reason in brackets, and the rest of the sentence."""
    try:
        yield
    except caught as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise kind(f"{fault} ({reason}){rest}") from error

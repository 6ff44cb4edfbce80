"""A bucket, through obstore: each operation is one request, repeated for a bounded time, and fails with an OSError.

Credentials are found by obstore itself, in the environment or from the machine's role. Messages are our own words and
the number of an HTTP status: what obstore says may quote a URL that is signed.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Any

from vggt_cache.environment import seconds_of
from vggt_cache.errors import SettingsError
from vggt_cache.place import address_of
from vggt_cache.store.filesystem import Buffer, ExplainedError

DEFAULT_RETRY_S = 60.0
"""So long a request is repeated that the service did not answer, or answered with a fault of its own."""
MAX_PUT_BYTES = 5 * 1024**3
"""What S3 takes in one request, and only one request is atomic."""
_MAX_RETRIES = 10
_STALL_S, _PUT_S = 30.0, 600.0
"""A read without a byte for so long is given up and repeated; the same of a whole upload."""
_STATUS = re.compile(r"status code: (\d{3})")
_LOOKING_FOR_CREDENTIALS = re.compile(r"169\.254\.169\.254|metadata\.google|Account must be specified")
"""Machines ask there for the credentials of their role, when the environment has none."""
_used_by: int | None = None
"""The process that obstore's threads live in, once they do. A fork has none of them, and would wait for ever."""

Meta = dict[str, Any]
"""obstore's: path, size in bytes, e_tag, last_modified."""


class Bucket:
    """`root`: such as s3://bucket. Keys are relative to it. Safe to use from several threads.

    All methods raise FileNotFoundError, FileExistsError where they say so, ExplainedError, and SettingsError where the
    package is missing.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self._address = address_of(root)

    def get(self, key: str, start: int, length: int, e_tag: str | None = None) -> memoryview:
        """These bytes of an object, of which there are so many; with `e_tag`, only of this version of it."""
        options: dict[str, Any] = {"range": (start, start + length)}
        with self._asking() as obstore:
            if e_tag:
                options["if_match"] = e_tag
            return memoryview(obstore.get(self._reading, key, options=options).bytes())

    def get_whole(self, key: str, limit: int) -> bytes | None:
        """A whole object; None where it has more than `limit` bytes."""
        with self._asking() as obstore:
            found = obstore.get(self._reading, key)
            return bytes(found.bytes()) if found.meta["size"] <= limit else None

    def head(self, key: str) -> Meta:
        with self._asking() as obstore:
            found: Meta = obstore.head(self._reading, key)
            return found

    def list_folder(self, key: str) -> tuple[list[str], list[Meta]]:
        """Keys of the folders right below `key`, and the objects there."""
        with self._asking() as obstore:
            found = obstore.list_with_delimiter(self._reading, key or None)
            return list(found["common_prefixes"]), list(found["objects"])

    def list_all(self, key: str) -> list[Meta]:
        """All objects below `key`, however deep."""
        with self._asking() as obstore:
            found: list[Meta] = obstore.list(self._reading, key or None).collect()
            return found

    def has_any(self, key: str) -> bool:
        """Whether there is an object below `key`."""
        with self._asking() as obstore:
            return any(obstore.list(self._reading, key or None, chunk_size=1))

    def put(self, key: str, data: Buffer) -> None:
        """Make this the object's content, in one request."""
        with self._asking(writing=True) as obstore:
            obstore.put(self._writing, key, _uploadable(data), use_multipart=False)

    def put_new(self, key: str, data: Buffer) -> None:
        """The same for an object that is not there yet. Raises FileExistsError where there is another one.

        A request that is repeated may meet what it has itself written: an object with these very bytes is ours.
        """
        try:
            with self._asking(writing=True) as obstore:
                obstore.put(self._writing, key, _uploadable(data), mode="create", use_multipart=False)
        except FileExistsError:
            if not self._holds(key, data):
                raise

    def delete(self, key: str) -> None:
        """Whether it was there is not told by all services."""
        with self._asking() as obstore:
            obstore.delete(self._reading, key)

    def _holds(self, key: str, data: Buffer) -> bool:
        with suppress(FileNotFoundError):  # removed meanwhile
            return self.head(key)["size"] == len(data) and self.get_whole(key, len(data)) == data
        return False

    # ------------------------------------------------------------ the client

    @cached_property
    def _reading(self) -> Any:
        return self._store(
            {"read_timeout": timedelta(seconds=_STALL_S), "timeout": timedelta(seconds=_PUT_S)}
        )

    @cached_property
    def _writing(self) -> Any:
        """While an upload goes on nothing is read: the time that a read may stall must not end it."""
        return self._store({"timeout": timedelta(seconds=_PUT_S)})

    def _store(self, client_options: dict[str, Any]) -> Any:
        from obstore.store import AzureStore, GCSStore, S3Store

        kind: Any = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}[self._address.scheme]
        # Who writes http:// into the environment means it; by default obstore refuses what is not encrypted.
        plain = any(value.startswith("http://") for name, value in os.environ.items() if "ENDPOINT" in name)
        pauses = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=5), "base": 2}
        patience = timedelta(seconds=seconds_of("VGGT_CACHE_CLOUD_RETRY_S", DEFAULT_RETRY_S))
        return kind(
            self._address.bucket,
            client_options={**client_options, **({"allow_http": True} if plain else {})},
            retry_config={"max_retries": _MAX_RETRIES, "retry_timeout": patience, "backoff": pauses},
        )

    @contextmanager
    def _asking(self, *, writing: bool = False) -> Iterator[Any]:
        """obstore, whose errors become ours."""
        global _used_by
        if _used_by not in (None, os.getpid()):
            raise ExplainedError(
                "this process was forked from one that has used a bucket, and would wait for threads that it has not",
                "start such processes with spawn (of a DataLoader: multiprocessing_context='spawn')",
            )
        obstore = require_obstore(self.root)
        _used_by = os.getpid()
        try:
            yield obstore
        except FileNotFoundError:
            if writing:
                raise _no_bucket() from None
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        except obstore.exceptions.AlreadyExistsError:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        except ExplainedError:
            raise
        except (obstore.exceptions.BaseError, OSError, NotImplementedError) as error:
            raise _explained(error) from None


@lru_cache
def bucket_at(root: str) -> Bucket:
    """One for each in a process, so that its connections are shared."""
    return Bucket(root)


def require_obstore(url: str) -> Any:
    """The package. Raises SettingsError where it is not installed."""
    try:
        import obstore
    except ImportError as error:
        raise SettingsError(
            f"{url} lies in a bucket, and the package obstore, which speaks to one, is not installed: run pip install "
            "'vggt-feature-cache[cloud]'"
        ) from error
    return obstore


def _uploadable(data: Buffer) -> Buffer:
    if len(data) > MAX_PUT_BYTES:
        raise ExplainedError(
            f"it has {len(data)} bytes, and a bucket takes {MAX_PUT_BYTES} at a time",
            "make shards smaller (VGGT_CACHE_SHARD_BYTES)",
        )
    return data


# ---------------------------------------------------------------- what a refusal means

_CREDENTIALS = (
    "give credentials for this bucket in the environment or by the machine's role (docs/object_stores.md)"
)
_LATER = "see that it is up, and run the same command again"


def _no_bucket() -> ExplainedError:
    return ExplainedError("there is no such bucket", "make it, or correct the URL")


def _explained(error: Exception) -> ExplainedError:
    kind, text = type(error).__name__, str(error)
    status = match[1] if (match := _STATUS.search(text)) else ""
    if kind == "PreconditionError":
        return ExplainedError("it was replaced while it was read", "read it again")
    if kind == "UnauthenticatedError":
        return ExplainedError("the service does not accept the credentials", _CREDENTIALS)
    if kind in ("PermissionDeniedError", "PermissionError"):
        return ExplainedError("the credentials do not allow this", _CREDENTIALS)
    if kind in ("NotSupportedError", "NotImplementedError") or status == "501":
        return ExplainedError(
            "the service does not know this operation",
            "run vggt-cache doctor on this URL, and use another service",
        )
    if "NoSuchBucket" in text:
        return _no_bucket()
    if _LOOKING_FOR_CREDENTIALS.search(text):
        return ExplainedError("no credentials were found", _CREDENTIALS)
    if status in ("429", "503"):
        return ExplainedError(
            f"the service asks for fewer requests, HTTP status {status}, also when asked again for a while",
            "start fewer processes, and run the same command again",
        )
    if status.startswith("5") or status == "408":
        return ExplainedError(
            f"the service fails with HTTP status {status}, also when asked again for a while", _LATER
        )
    if status:
        return ExplainedError(
            f"the service refuses the request with HTTP status {status}",
            "check the bucket's name, its region (AWS_REGION) and the endpoint",
        )
    return ExplainedError(
        "the service cannot be reached, also when asked again for a while",
        "check the network and the endpoint (such as AWS_ENDPOINT_URL), and run the same command again",
    )

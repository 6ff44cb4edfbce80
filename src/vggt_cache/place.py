"""Where a cache lies: a directory of this machine, or a bucket, which a URL names. What is a URL is decided here alone.

s3://bucket/prefix   Amazon S3, and what speaks like it
gs://bucket/prefix   Google Cloud Storage
az://container/prefix   Azure Blob Storage
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vggt_cache.errors import SettingsError, VggtCacheError

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_LOST_SLASH = re.compile(rf"(?:{'|'.join(SCHEMES)}):/(?!/)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Address(NamedTuple):
    """A place in a bucket."""

    scheme: str
    bucket: str
    key: str
    """Without slashes at its ends; empty for the bucket itself."""


def is_url(path: str | os.PathLike[str]) -> bool:
    return _URL.match(os.fspath(path)) is not None


def absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path of a directory; a URL stays as it is, without slashes at its end. Raises SettingsError."""
    text = os.fspath(path)
    if _LOST_SLASH.match(text):
        raise SettingsError(
            f"{text} is a URL that has lost a slash, as pathlib.Path makes of one: give it as a string"
        )
    if not is_url(text):
        return os.path.abspath(text)
    scheme, bucket, key = address_of(text)
    return f"{scheme}://{bucket}/{key}".rstrip("/")


def address_of(url: str) -> Address:
    """Raises SettingsError for a URL that names no place where a cache can be; what may be secret is not repeated."""
    match = _URL.fullmatch(url)
    scheme, rest = match.groups() if match else ("", url)
    if scheme not in SCHEMES:
        raise SettingsError(
            f"{scheme}:// names no place where a cache can be: give a directory, or a URL that begins with "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
    bucket, _, key = rest.partition("/")
    if "@" in bucket or "?" in rest or "#" in rest:
        raise SettingsError(
            f"a {scheme}:// URL was given with a user, a password or a query in it, which would end up in logs: give "
            f"{scheme}://bucket/prefix alone, and the credentials in the environment"
        )
    key = key.strip("/")
    if not _BUCKET.fullmatch(bucket) or (key and {"", ".", ".."}.intersection(key.split("/"))):
        raise SettingsError(f"{url} is no place in a bucket: give {scheme}://bucket/prefix")
    return Address(scheme, bucket, key)


def require_local(
    path: str | os.PathLike[str], name: str, kind: type[VggtCacheError] = SettingsError
) -> None:
    """Raises `kind` where a URL is given for what must be on this machine; `name`: the flag."""
    if is_url(path):
        scheme = os.fspath(path).partition("://")[0]
        raise kind(
            f"{name} {scheme}://... lies in a bucket, and only a cache can: copy it to a disk of this machine, or "
            "mount it, and name that path"
        )

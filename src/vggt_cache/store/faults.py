"""What the operating system's refusals mean to the user: one sentence each, with the remedy."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from vggt_cache.errors import CacheAccessError, CommitError

_READ_REMEDY = {
    errno.EACCES: "ask its owner for permission (ls -ld shows who that is)",
    errno.EPERM: "ask its owner for permission (ls -ld shows who that is)",
    errno.ENOENT: "it was there before: see whether it was moved or its file system unmounted",
    errno.EROFS: "it is mounted read-only: use a directory that can be written",
    errno.ELOOP: "a symbolic link in this path leads back to itself: correct the link",
    errno.ESTALE: "the network file system has lost it: mount it again and start anew",
    errno.EIO: "the disk or the network reports a fault: see dmesg, and copy the cache elsewhere if it can be read",
    errno.EMFILE: "too many files are open in this process: raise the limit (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
    errno.ENOTDIR: "a part of this path is not a directory: correct the path",
}
_WRITE_REMEDY = {
    **_READ_REMEDY,
    errno.ENOSPC: "the disk is full: free some space (df shows how much) and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space (quota shows how much) and run the same command again",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f): raise the limit and run the same command again",
}


def _cause(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def access_error(path: str, error: OSError) -> CacheAccessError:
    """`path` cannot be read."""
    remedy = _READ_REMEDY.get(error.errno or 0, "check the file system it lies on")
    return CacheAccessError(f"{path} cannot be used ({_cause(error)}): {remedy}")


def commit_error(path: str, error: OSError) -> CommitError:
    """A file in the directory `path` could not be written to the disk."""
    remedy = _WRITE_REMEDY.get(
        error.errno or 0, "see that the disk is in order, and run the same command again"
    )
    return CommitError(
        f"a file in {path} could not be brought to the disk ({_cause(error)}), so it was not committed; "
        f"what was committed before is untouched: {remedy}"
    )


@contextmanager
def accessing(path: str) -> Iterator[None]:
    """OSErrors of the body become CacheAccessError about `path`."""
    try:
        yield
    except OSError as error:
        raise access_error(path, error) from error

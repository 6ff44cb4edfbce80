"""Digests that are known already, so that planning an unchanged data set reads metadata and no image.

A row says: the file with this path, size, mtime, ctime and inode had this sha256. Rows only save work: a
feature's key is always computed from the bytes that are decoded, and `get` and `--verify` read the bytes
anew. A wrong row could at worst make precompute skip or repeat a frame, never serve a wrong feature.

Two files can have one state, as when a link leads elsewhere. So the newest row of a state counts, and verification,
which reads the bytes, writes down what it saw: precompute then computes what verification found missing.

The rows lie in `digests/`, as `store.rows` writes them.
"""

from __future__ import annotations

import struct
import time

import xxhash

from vggt_cache.frames import read_frame
from vggt_cache.small_files import FileState, file_state
from vggt_cache.store.rows import RowTable

_COARSE_CLOCK_NS, _FINE_CLOCK_NS = 2_000_000_000, 50_000_000


def state_hash(name: str, state: FileState) -> bytes:
    """16 bytes that stand for one state of one file."""
    text = name.encode("utf-8", "surrogateescape") + b"\0"
    return xxhash.xxh3_128_digest(text + struct.pack("<qqqQ", *state))


def settled(state: FileState, read_at_ns: int) -> bool:
    """Whether the file could not have changed again within the same tick of its file system's clock.

    File systems that keep whole seconds are recognised by their time stamps.
    """
    _, mtime_ns, ctime_ns, _ = state
    whole_seconds = mtime_ns % 1_000_000_000 == 0 and ctime_ns % 1_000_000_000 == 0
    return read_at_ns - max(mtime_ns, ctime_ns) > (_COARSE_CLOCK_NS if whole_seconds else _FINE_CLOCK_NS)


def read_in_state(path: str) -> tuple[bytes, bytes]:
    """A frame's bytes, and the state hash of the file that had them. Raises FrameError.

    The hash is empty where the file changed while it was read, or so shortly before that it may change unnoticed.
    """
    before, read_at_ns = file_state(path), time.time_ns()
    data = read_frame(path)
    if before is None or before != file_state(path) or not settled(before, read_at_ns):
        return data, b""
    return data, state_hash(path, before)


class DigestTable(RowTable):
    """The newest digest of each state of a file, of all that the processes of this cache directory have written."""

    folder, magic = "digests", b"VGFCdig1"

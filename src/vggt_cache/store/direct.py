"""Reading past the page cache (O_DIRECT), for caches larger than memory: which cache, and how one piece is read.

Through the page cache the system makes room for pages that nobody will ask for again, and copies each byte once more,
which is most of what a processor has to do for a cold read. Past it the device writes straight into the reader's
memory, where offset, length and address are multiples of a block.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from vggt_cache.errors import require_one_of
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.filesystem import FileSystem
from vggt_cache.store.format import ALIGNMENT_BYTES
from vggt_cache.store.record import RecordTable, record_bytes

AUTO, DIRECT, BUFFERED = IO_MODES = ("auto", "direct", "buffered")
_RECORDS_WEIGHED = 1000


def io_of(io: str | None) -> str:
    """How a cache is read: as asked, else as the environment's VGGT_CACHE_IO says. Raises SettingsError."""
    said = io or os.environ.get("VGGT_CACHE_IO") or AUTO
    require_one_of("io" if io else "VGGT_CACHE_IO", said, IO_MODES)
    return said


def is_larger_than_memory(size_bytes: int) -> bool:
    """Whether so many bytes are more than this machine could keep in its page cache; where that is unknown, no.

    Whoever reads a cache that fits into memory a second time finds it there, many times faster than any disk.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(line for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return False
    return size_bytes > 1024 * int(available.split()[1])


def bytes_of_table(table: RecordTable, spec: FeatureSpec) -> int:
    """Bytes of all records in their files, about: as a thousand of them, spread over the keys, are on average."""
    rows = table.rows[:: max(1, len(table.rows) // _RECORDS_WEIGHED)]
    return record_bytes(rows, spec)[1] * len(table.rows) // max(1, len(rows))


def is_in_blocks(target: memoryview, offset: int) -> bool:
    """Whether `target` can be filled from `offset` without blocks that lie half outside of it."""
    return (offset | len(target) | np.frombuffer(target, np.uint8).ctypes.data) % ALIGNMENT_BYTES == 0


def read_blocks(fs: FileSystem, fd: int, target: memoryview, offset: int) -> int:
    """Fill `target`, which `is_in_blocks`, from a descriptor of `reopen_direct`; returns the bytes read.

    Fewer than asked at the end of the file, and where the system stopped within a block.
    """
    done = 0
    while done < len(target):
        count = fs.preadv(fd, [target[done:]], offset + done)
        done += count
        if count % ALIGNMENT_BYTES or not count:  # the next read would not begin at a block
            break
    return done


def read_around(
    fs: FileSystem, fd: int, target: memoryview, offset: int, *, scratch: Callable[[int], memoryview]
) -> int:
    """The same for all else: the blocks around it are read into memory of `scratch`, and copied from there."""
    before = offset % ALIGNMENT_BYTES
    blocks = scratch(-(-(before + len(target)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    count = min(max(0, read_blocks(fs, fd, blocks, offset - before) - before), len(target))
    # numpy lets other threads run while it copies; a memoryview does not.
    np.copyto(
        np.frombuffer(target, np.uint8)[:count], np.frombuffer(blocks, np.uint8)[before : before + count]
    )
    return count

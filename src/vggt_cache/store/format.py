"""A shard's bytes, as they are written, and the limits of what `header.py` reads. See `docs/format.md`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from vggt_cache.codec import DTYPE_NAMES, NONE
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.record import Record, shape_of, stored_length

FORMAT_NAME = "vggt-feature-cache"
FORMAT_VERSION = "1"
CODED_FORMAT_VERSION = "2"
"""Of shards whose records a codec packed."""
ALIGNMENT_BYTES = 4096
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_RECORDS = 16384
MAX_SIDE = 65535
"""Largest height or width of a feature, in patches."""
MAX_CHANNELS = 1 << 20
MAX_DATA_BYTES = 1 << 50
MAX_STORED_BYTES = (1 << 32) - 1
"""Of one packed record, since the index has 32 bits for it."""

CODED_DTYPE = "U8"
"""Of packed records: bytes, to safetensors."""
SHARD_NAME = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}\.safetensors")

_ENTRY_BYTES = 204
"""The most that one record of shape [h, w, C] takes in a header: its entry with the largest numbers, and checksum."""


# ---------------------------------------------------------------- writing


def reserved_header_bytes(spec: FeatureSpec, max_records: int, codec: str = NONE) -> int:
    """Where data begin in a shard of up to `max_records` records: length field and header, aligned."""
    fixed = LENGTH_BYTES + len(_metadata_text(spec, [], codec)) + 64
    entry = _ENTRY_BYTES + 6 * max(0, len(spec.axes) - 3)
    return -(-(fixed + max_records * entry) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def build_header(spec: FeatureSpec, records: Sequence[Record], data_start: int, codec: str = NONE) -> bytes:
    """The first `data_start` bytes of a shard: length field, JSON, spaces."""
    entries = [f'"__metadata__":{_metadata_text(spec, records, codec)}']
    entries += [_entry_text(spec, record, record.offset - data_start, codec) for record in records]
    text = ("{" + ",".join(entries) + "}").encode()
    length = data_start - LENGTH_BYTES
    if len(text) > length:
        raise ValueError(f"the header takes {len(text)} bytes and {length} are reserved")
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def _entry_text(spec: FeatureSpec, record: Record, start: int, codec: str) -> str:
    end = start + stored_length(spec, record)
    if codec == NONE:
        sides = shape_of(spec, record.h, record.w, record.frames)
        dtype, shape = DTYPE_NAMES[spec.feature_dtype], ",".join(map(str, sides))
    else:
        dtype, shape = CODED_DTYPE, f"{record.stored_bytes}"
    return f'"{record.key.hex()}":{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{start},{end}]}}'


def _metadata_text(spec: FeatureSpec, records: Sequence[Record], codec: str) -> str:
    coded = codec != NONE
    metadata = {
        "format": FORMAT_NAME,
        "format_version": CODED_FORMAT_VERSION if coded else FORMAT_VERSION,
        **({"codec": codec} if coded else {}),
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
    }
    for record in records:
        sides = zip(spec.axes, shape_of(spec, record.h, record.w, record.frames), strict=True)
        own = [f" {side}" for axis, side in sides if isinstance(axis, str)]
        metadata[record.key.hex()] = record.checksum.hex() + ("".join(own) if coded else "")
    return json.dumps(metadata, separators=(",", ":"))

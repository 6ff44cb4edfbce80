"""A shard's bytes: a safetensors file whose header carries, per record, a checksum. See `docs/format.md`.

What is written, and the limits of what is read; `parse.py` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import xxhash

from vggt_cache.identity import FeatureSpec
from vggt_cache.store.rows import Record

FORMAT_NAME = "vggt-feature-cache"
FORMAT_VERSION = "1"
ALIGNMENT_BYTES = 4096
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_RECORDS = 16384
MAX_SIDE = 65535
"""Largest height or width of a feature, in patches."""
MAX_CHANNELS = 1 << 20
MAX_DATA_BYTES = 1 << 50

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_ENTRY_BYTES = 204
"""The most that one record takes in a header: its entry with the largest numbers, and its checksum."""


def payload_bytes(spec: FeatureSpec, h: int, w: int) -> int:
    """Bytes of a feature [h, w, C]."""
    return h * w * spec.encoder.channels * ITEM_BYTES[spec.feature_dtype]


def record_checksum(spec: FeatureSpec, key: bytes, h: int, w: int, payload: bytes | memoryview) -> bytes:
    """xxh3-128 (16 bytes, canonical order) over payload, key, dtype name, and h, w, C as u32 little-endian."""
    return finish_checksum(xxhash.xxh3_128(payload), spec, key, h, w)


def finish_checksum(hasher: xxhash.xxh3_128, spec: FeatureSpec, key: bytes, h: int, w: int) -> bytes:
    """The record's checksum from a hasher that has seen the payload."""
    shape = b"".join(side.to_bytes(4, "little") for side in (h, w, spec.encoder.channels))
    hasher.update(key + DTYPE_NAMES[spec.feature_dtype].encode() + shape)
    return hasher.digest()


# ---------------------------------------------------------------- writing


def reserved_header_bytes(spec: FeatureSpec, max_records: int) -> int:
    """Where data begin in a shard of up to `max_records` records: length field and header, aligned."""
    fixed = LENGTH_BYTES + len(_metadata_text(spec, [])) + 64
    return -(-(fixed + max_records * _ENTRY_BYTES) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def build_header(spec: FeatureSpec, records: Sequence[Record], data_start: int) -> bytes:
    """The first `data_start` bytes of a shard: length field, JSON, spaces."""
    entries = [f'"__metadata__":{_metadata_text(spec, records)}']
    shape_tail, dtype = spec.encoder.channels, DTYPE_NAMES[spec.feature_dtype]
    for record in records:
        start = record.offset - data_start
        end = start + payload_bytes(spec, record.h, record.w)
        entries.append(
            f'"{record.key.hex()}":{{"dtype":"{dtype}","shape":[{record.h},{record.w},{shape_tail}],'
            f'"data_offsets":[{start},{end}]}}'
        )
    text = ("{" + ",".join(entries) + "}").encode()
    length = data_start - LENGTH_BYTES
    if len(text) > length:
        raise ValueError(f"the header takes {len(text)} bytes and {length} are reserved")
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)


def _metadata_text(spec: FeatureSpec, records: Sequence[Record]) -> str:
    metadata = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "fingerprint": spec.fingerprint,
        "spec": spec.to_json(),
        **{record.key.hex(): record.checksum.hex() for record in records},
    }
    return json.dumps(metadata, separators=(",", ":"))

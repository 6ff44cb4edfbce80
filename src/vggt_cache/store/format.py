"""A shard's bytes: a safetensors file whose header carries, per record, a checksum. See `docs/format.md`.

Everything here is pure: bytes in, records out, and back. A header is not believed: whatever the bytes are,
`parse_header` returns records that the format allows, or raises ShardFormatError.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import xxhash

from vggt_cache.errors import ShardFormatError, SpecMismatchError
from vggt_cache.identity import FeatureSpec

FORMAT_NAME = "vggt-feature-cache"
FORMAT_VERSION = "1"
ALIGNMENT_BYTES = 4096
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 4 * 1024 * 1024
MAX_RECORDS = 16384
MAX_SIDE = 65535
"""Largest height or width of a feature, in patches."""

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

_KEY = re.compile(r"[0-9a-f]{32}")
_ENTRY_FIELDS = {"dtype", "shape", "data_offsets"}
_ENTRY_BYTES = 208
"""The most that one record takes in a header, with offsets up to 10^15 and channels up to 10^7."""


class ForeignShardError(ShardFormatError):
    """An intact shard that does not belong here: another format version, another specification, not a plain file.

    Never removed by us: it may be somebody's good data in the wrong place.
    """


class Record(NamedTuple):
    """Where one feature lies in its shard. `nbytes` follows from the specification."""

    key: bytes
    offset: int
    """From the start of the file, in bytes."""
    h: int
    w: int
    checksum: bytes


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard's header says, checked for sense but not against the file's length."""

    spec: FeatureSpec
    records: list[Record]
    """In the order of their offsets."""
    data_end: int
    """Length in bytes that the file must have."""


def payload_bytes(spec: FeatureSpec, h: int, w: int) -> int:
    """Bytes of a feature [h, w, C]."""
    return h * w * spec.encoder.channels * ITEM_BYTES[spec.feature_dtype]


def record_checksum(spec: FeatureSpec, key: bytes, h: int, w: int, payload: bytes | memoryview) -> bytes:
    """xxh3-128 (16 bytes, canonical order) over payload, key, dtype name, and h, w, C as u32 little-endian."""
    hasher = xxhash.xxh3_128(payload)
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


# ---------------------------------------------------------------- reading


def header_length(prefix: bytes, shard: str) -> int:
    """Bytes of the JSON header, from the first 8 bytes of a shard. Raises ShardFormatError over the limit."""
    if len(prefix) < LENGTH_BYTES:
        _refuse(shard, f"it has only {len(prefix)} bytes")
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if not 2 <= length <= MAX_HEADER_BYTES:
        _refuse(shard, f"its header claims {length} bytes, where 2 to {MAX_HEADER_BYTES} are allowed")
    return length


def parse_header(data: bytes, shard: str) -> ShardHeader:
    """Parse length field and header. `shard` names the file in messages.

    Raises ShardFormatError, and nothing else, whatever the bytes; its subclass ForeignShardError where the
    shard is of another format version.
    """
    length = header_length(data, shard)
    if len(data) < LENGTH_BYTES + length:
        _refuse(shard, f"its header should have {length} bytes and has {len(data) - LENGTH_BYTES}")
    try:
        names = _decode(data[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = _metadata(names)
        _check_version(metadata, shard)
        spec = _spec_of(_text(metadata, "spec"), _text(metadata, "fingerprint"))
        records, data_end = _records(names, metadata, spec, LENGTH_BYTES + length)
    except (ValueError, RecursionError) as error:
        _refuse(shard, str(error) or type(error).__name__)
    return ShardHeader(spec=spec, records=records, data_end=data_end)


def _refuse(shard: str, reason: str) -> NoReturn:
    raise ShardFormatError(f"shard {shard} cannot be read: {reason}")


def _decode(header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise ValueError("its header does not begin with '{'")
    # A small file must not unfold into a large structure: count the brackets before parsing.
    if header.count(b"[") > 2 * MAX_RECORDS or header.count(b"{") > MAX_RECORDS + 16:
        raise ValueError(f"its header has more than {MAX_RECORDS} records")
    value = _JSON.decode(header.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("its header is not an object")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return result


def _no_such_number(text: str) -> NoReturn:
    raise ValueError(f"its header has the number {_short(text)} where only integers are allowed")


_JSON = json.JSONDecoder(
    object_pairs_hook=_unique_names, parse_float=_no_such_number, parse_constant=_no_such_number
)


def _metadata(names: dict[str, Any]) -> dict[str, Any]:
    metadata = names.pop("__metadata__", None)
    if not isinstance(metadata, dict):
        raise ValueError("its header has no __metadata__")
    return metadata


def _text(metadata: dict[str, Any], name: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str):
        raise ValueError(f"its header's metadata have no text {name!r}")
    return value


def _check_version(metadata: dict[str, Any], shard: str) -> None:
    if _text(metadata, "format") != FORMAT_NAME:
        raise ValueError(f"its format is {_short(metadata['format'])}, not {FORMAT_NAME}")
    if _text(metadata, "format_version") != FORMAT_VERSION:
        raise ForeignShardError(
            f"shard {shard} cannot be read: it has format version {_short(metadata['format_version'])} and this "
            f"program reads version {FORMAT_VERSION}; use the program that wrote it"
        )


@lru_cache(maxsize=16)
def _spec_of(text: str, fingerprint: str) -> FeatureSpec:
    if hashlib.sha256(text.encode()).hexdigest() != fingerprint:
        raise ValueError("its specification does not match its fingerprint")
    try:
        return FeatureSpec.from_json(text)
    except SpecMismatchError as error:
        raise ValueError(str(error)) from error


def _records(
    names: dict[str, Any], metadata: dict[str, Any], spec: FeatureSpec, data_start: int
) -> tuple[list[Record], int]:
    if len(names) > MAX_RECORDS:
        raise ValueError(f"its header has {len(names)} records, over the limit of {MAX_RECORDS}")
    if sum(map(_is_key, metadata)) != len(names):
        raise ValueError("its checksums are not those of its records")
    dtype, channels = DTYPE_NAMES[spec.feature_dtype], spec.encoder.channels
    spans = []
    for name, entry in names.items():
        key, checksum = _from_hex(name, "record name"), _from_hex(metadata.get(name), "checksum")
        h, w, start, end = _geometry(name, entry, dtype, channels)
        if end - start != payload_bytes(spec, h, w):
            raise ValueError(f"record {name} has shape [{h}, {w}, {channels}] in {end - start} bytes")
        spans.append((start, end, Record(key, data_start + start, h, w, checksum)))
    spans.sort(key=lambda span: span[0])
    reached = 0
    for start, end, record in spans:
        if start != reached:
            raise ValueError(
                f"record {record.key.hex()} begins at byte {start} of the data, not at {reached}"
            )
        reached = end
    return [record for _, _, record in spans], data_start + reached


def _geometry(name: str, entry: Any, dtype: str, channels: int) -> tuple[int, int, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_FIELDS:
        raise ValueError(f"record {name} has not exactly dtype, shape and data_offsets")
    if entry["dtype"] != dtype:
        raise ValueError(f"record {name} has dtype {_short(entry['dtype'])}, not {dtype}")
    h, w, c = _integers(name, entry["shape"], 3)
    start, end = _integers(name, entry["data_offsets"], 2)
    if not (0 < h <= MAX_SIDE and 0 < w <= MAX_SIDE and c == channels and start >= 0):
        raise ValueError(f"record {name} has shape {_short([h, w, c])} at {_short(start)}, which cannot be")
    return h, w, start, end


def _integers(name: str, value: Any, count: int) -> list[int]:
    if not isinstance(value, list) or len(value) != count or any(type(item) is not int for item in value):
        raise ValueError(f"record {name} has {_short(value)} where {count} integers are needed")
    return value


def _is_key(name: str) -> bool:
    return _KEY.fullmatch(name) is not None


def _from_hex(text: object, what: str) -> bytes:
    if not isinstance(text, str) or not _is_key(text):
        raise ValueError(f"{_short(text)} is no {what}: 32 hexadecimal digits are needed")
    return bytes.fromhex(text)


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal form
        text = "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."

"""From the first bytes of a shard to its records. A header is not believed.

Whatever the bytes are, `parse_header` returns records that the format allows, or raises ShardFormatError; then
`rescue_records` tells what may be left. Nothing is allocated here that is much larger than the bytes given.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from vggt_cache.call_spec import KIND, CallSpec
from vggt_cache.codec import DTYPE_NAMES, ITEM_BYTES, NONE, codec_for, coded_form
from vggt_cache.errors import ShardFormatError, SpecMismatchError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.format import (
    CODED_DTYPE,
    CODED_FORMAT_VERSION,
    FORMAT_NAME,
    FORMAT_VERSION,
    LENGTH_BYTES,
    MAX_CHANNELS,
    MAX_DATA_BYTES,
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    MAX_SIDE,
    MAX_STORED_BYTES,
)
from vggt_cache.store.record import (
    ROW_DTYPE,
    Record,
    Rows,
    cells_of,
    payload_bytes,
    stored_length,
    unpack_rows,
)


class ForeignShardError(ShardFormatError):
    """A shard of another format version or specification, or not a plain file.

    It is never removed: it may be somebody's good data in the wrong place.
    """


class UnknownFormatError(ForeignShardError):
    """A shard that names another format version, or another codec. One flipped bit can make one of ours look so."""


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard's header says, checked for sense but not against the file's length."""

    spec: FeatureSpec
    codec: str
    """What packed its records; `none` where they are as they are."""
    rows: Rows
    """Its records, in the order of their offsets; `shard` is 0."""
    data_end: int
    """Length in bytes that the file must have."""

    @property
    def records(self) -> list[Record]:
        return [record for _, record in unpack_rows(self.rows)]


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

    Raises ShardFormatError, and nothing else, whatever the bytes; UnknownFormatError for another format version.
    """
    length = header_length(data, shard)
    if len(data) < LENGTH_BYTES + length:
        _refuse(shard, f"its header should have {length} bytes and has {len(data) - LENGTH_BYTES}")
    try:
        names = _decode(data[LENGTH_BYTES : LENGTH_BYTES + length])
        metadata = names.pop("__metadata__", None)
        if not isinstance(metadata, dict):
            raise ValueError("its header has no __metadata__")
        version = _version(metadata, shard)
        spec = _spec_of(_text(metadata, "spec"), _text(metadata, "fingerprint"))
        codec = NONE if version == FORMAT_VERSION else _codec(metadata, spec, shard)
        checksums = {name: value for name, value in metadata.items() if _DIGEST.fullmatch(name)}
        if checksums.keys() != names.keys():
            raise ValueError("the names of its records are not those of its checksums")
        rows, spans = _table(names, checksums, spec, codec)
        if (spans[:, 0] != np.append(0, spans[:, 1])[: len(spans)]).any():
            raise ValueError("its records do not follow each other without gaps")
    except (ValueError, RecursionError) as error:
        _refuse(shard, str(error) or type(error).__name__)
    data_start = LENGTH_BYTES + length
    rows["offset"] += data_start
    return ShardHeader(
        spec=spec, codec=codec, rows=rows, data_end=data_start + int(spans[:, 1].max(initial=0))
    )


def _refuse(shard: str, reason: str, kind: type[ShardFormatError] = ShardFormatError) -> NoReturn:
    raise kind(f"shard {shard} cannot be read: {reason}")


def _decode(header: bytes) -> dict[str, Any]:
    if header[:1] != b"{":
        raise ValueError("its header does not begin with '{'")
    header = header.rstrip(b" ")
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


_JSON = json.JSONDecoder(object_pairs_hook=_unique_names)


def _text(metadata: dict[str, Any], name: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str):
        raise ValueError(f"its header's metadata have no text {name!r}")
    return value


def _version(metadata: dict[str, Any], shard: str) -> str:
    if _text(metadata, "format") != FORMAT_NAME:
        raise ValueError(f"its format is {short(metadata['format'])}, not {FORMAT_NAME}")
    version = _text(metadata, "format_version")
    if version not in (FORMAT_VERSION, CODED_FORMAT_VERSION):
        reason = (
            f"it has format version {short(version)} and this program reads versions {FORMAT_VERSION} and "
        )
        _refuse(shard, f"{reason}{CODED_FORMAT_VERSION}; use the program that wrote it", UnknownFormatError)
    return version


def _codec(metadata: dict[str, Any], spec: FeatureSpec, shard: str) -> str:
    codec = metadata.get("codec")
    known = coded_form(spec.feature_dtype)
    if known == NONE or codec != known:
        reason = f"its records of {spec.feature_dtype} are packed by codec {short(codec)}, which this program does not "
        _refuse(shard, f"{reason}know; use the program that wrote it", UnknownFormatError)
    return known


@lru_cache(maxsize=16)
def _spec_of(text: str, fingerprint: str) -> FeatureSpec:
    if hashlib.sha256(text.encode()).hexdigest() != fingerprint:
        raise ValueError("its specification does not match its fingerprint")
    try:
        return parse_spec(text)
    except SpecMismatchError as error:
        raise ValueError(str(error)) from error


def parse_spec(text: str) -> FeatureSpec:
    """The specification that `text` is the canonical JSON of, fit to store features. Raises SpecMismatchError."""
    if f'"kind":"{KIND}"' in text:
        return cast("FeatureSpec", CallSpec.from_json(text))  # which has all that the store asks
    spec = FeatureSpec.from_json(text)
    if type(spec.encoder.channels) is not int or not 1 <= spec.encoder.channels <= MAX_CHANNELS:
        raise SpecMismatchError(
            f"the cache's specification has features of {short(spec.encoder.channels)} channels, which cannot be: it "
            "is damaged; precompute again into a new directory"
        )
    return spec


# ---------------------------------------------------------------- where records lie

Integers = npt.NDArray[np.int64]
_ENTRY_FIELDS = itemgetter("dtype", "shape", "data_offsets")
_DIGEST = re.compile(r"([0-9a-f]{32})")
_SIDE = " ([1-9][0-9]{0,4})"


def _table(
    entries: Mapping[str, Any], checksums: Mapping[str, Any], spec: FeatureSpec, codec: str
) -> tuple[Rows, Integers]:
    """Rows and byte spans [records, 2] in order; offsets count from where data begin. Raises ValueError."""
    sides, spans, stored, digests = _fields(entries, checksums, spec, codec)
    if codec != NONE:
        least, most = codec_for(codec).size_limits(_cells(sides, spec), spec.encoder.channels)
        if not ((stored >= least) & (stored <= np.minimum(most, MAX_STORED_BYTES))).all():
            raise ValueError(f"a record has more or fewer bytes than codec {codec} makes of its shape")
    if not ((spans >= 0) & (spans <= MAX_DATA_BYTES)).all():
        raise ValueError(f"a record lies outside of the {MAX_DATA_BYTES} bytes that a shard can have")
    if (spans[:, 1] - spans[:, 0] != stored).any():
        raise ValueError("a record has more or fewer bytes than its shape says")
    rows = np.zeros(len(entries), ROW_DTYPE)
    keys = np.frombuffer(bytes.fromhex("".join(entries)), ">u8").reshape(-1, 2)
    rows["high"], rows["low"] = keys[:, 0], keys[:, 1]
    rows["checksum"] = np.frombuffer(bytes.fromhex("".join(digests)), "V16")
    rows["offset"], rows["stored"] = spans[:, 0], 0 if codec == NONE else stored
    rows["h"], rows["w"], rows["frames"] = sides.T
    order = np.argsort(spans[:, 0], kind="stable")
    return rows[order], spans[order]


def _fields(
    entries: Mapping[str, Any], checksums: Mapping[str, Any], spec: FeatureSpec, codec: str
) -> tuple[Integers, Integers, Integers, list[str]]:
    """h, w and frames [records, 3], byte spans [records, 2], stored bytes [records], and checksums. Raises ValueError.

    A record as it is says its shape. A packed one is bytes to safetensors, and has its own sides, such as h and w,
    beside its checksum.
    """
    packed, axes = codec != NONE, spec.axes
    own = [axis for axis in axes if isinstance(axis, str)]
    if not packed and spec.feature_dtype not in DTYPE_NAMES:
        raise ValueError(f"its records are not packed, and {spec.feature_dtype} is kept in packed ones only")
    dtype, dimensions = (CODED_DTYPE, 1) if packed else (DTYPE_NAMES[spec.feature_dtype], len(axes))
    shapes, spans = _entries(list(entries.values()), dtype, dimensions)
    found = [_match(checksums[name], own if packed else []) for name in entries]
    if packed:
        texts = [match.groups()[1:] for match in found]
        values = dict(zip(own, np.array(texts, np.int64).reshape(-1, len(own)).T, strict=True))
    else:
        values = {axis: shapes[:, place] for place, axis in enumerate(axes) if isinstance(axis, str)}
        fixed = [place for place, axis in enumerate(axes) if isinstance(axis, int)]
        if (shapes[:, fixed] != [axes[place] for place in fixed]).any():
            raise ValueError(f"a record's shape is not [{', '.join(map(str, axes))}]")
    if not all(((side >= 1) & (side <= MAX_SIDE)).all() for side in values.values()):
        raise ValueError(f"a record has a side of more than {MAX_SIDE} patches, or of none")
    one, none = np.ones(len(entries), np.int64), np.zeros(len(entries), np.int64)
    last = values["w"] if "w" in values else values["n"]
    sides = np.stack([values.get("h", one), last, values.get("frames", none)], axis=1)
    stored = (
        shapes[:, 0]
        if packed
        else _cells(sides, spec) * ITEM_BYTES[spec.feature_dtype] * spec.encoder.channels
    )
    return sides, spans, stored, [match[1] for match in found]


def _cells(sides: Integers, spec: FeatureSpec) -> Integers:
    """How many tokens of C channels each record has. Raises ValueError where so many cannot be."""
    cells = sides[:, 0] * sides[:, 1] * np.maximum(sides[:, 2], 1)
    if (cells > MAX_DATA_BYTES // payload_bytes(spec, 1, 1, 1)).any():
        raise ValueError(f"a record's shape has more than the {MAX_DATA_BYTES} bytes that a shard can have")
    return cells * cells_of(spec, 1, 1, 1)


def _entries(entries: list[Any], dtype: str, dimensions: int) -> tuple[Integers, Integers]:
    """Shapes [records, dimensions] and byte spans [records, 2] of entries which have just these, and `dtype`."""
    if any(type(entry) is not dict or len(entry) != 3 for entry in entries):
        raise ValueError("a record must have exactly dtype, shape and data_offsets")
    try:
        fields = list(map(_ENTRY_FIELDS, entries))
    except KeyError as error:
        raise ValueError(f"a record has no {error}") from error
    wrong = [found for found, _, _ in fields if found != dtype]
    if wrong:
        raise ValueError(f"a record has dtype {short(wrong[0])}, not {dtype}")
    shapes = _integers([shape for _, shape, _ in fields], dimensions)
    return shapes, _integers([span for _, _, span in fields], 2)


def _integers(lists: list[Any], length: int) -> Integers:
    """Lists of so many integers as an array [lists, length]."""
    if any(type(item) is not list or len(item) != length for item in lists):
        raise ValueError(f"a record has something else where {length} integers are needed")
    if not set(map(type, chain.from_iterable(lists))) <= {int}:
        raise ValueError("a record has a value that is not an integer")
    try:
        return np.array(lists, np.int64).reshape(-1, length)
    except OverflowError as error:
        raise ValueError("a record has an integer of more than 64 bits") from error


def _match(text: Any, own: Sequence[str]) -> re.Match[str]:
    match = re.fullmatch(_DIGEST.pattern + _SIDE * len(own), text) if type(text) is str else None
    if match is None:
        wanted = "32 hexadecimal digits" + (f", {' and '.join(own)}" if own else "")
        raise ValueError(f"{short(text)} stands where {wanted} are needed")
    return match


def short(value: object) -> str:
    """A value of a header, for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal form
        text = "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."


# ---------------------------------------------------------------- what the remains of a damaged header still tell

_REMAINS = re.compile(
    rb'"([0-9a-f]{32})":('
    rb'\{"dtype":"[A-Z0-9]{2,4}","shape":\[[0-9,]{1,32}\],"data_offsets":\[[0-9]{1,16},[0-9]{1,16}\]\}'
    rb'|"[0-9a-f]{32}(?: [1-9][0-9]{0,4}){0,3}")'
)
"""What the writer writes of one record: its entry, or its checksum."""


def rescue_records(remains: bytes, file_bytes: int, spec: FeatureSpec) -> Iterator[list[Record]]:
    """The records whose entry and checksum are whole in the remains of a header, once for each possible data start.

    A flipped bit must not cost more than the record that it hits, and nothing is believed for that: only its checksum,
    which covers key and shape, proves a record, and with it the place where the data begin. That is behind the header
    as its length field says; or so that they end with the file.
    """
    texts: dict[str, set[bytes]] = {}
    for match in _REMAINS.finditer(remains):
        texts.setdefault(match[1].decode(), set()).add(match[2])
    # With more than two different texts behind it a name is ambiguous, with fewer half of it is lost. The same text
    # again, which lies in the data or was written over something, takes nothing from what it says.
    pairs = [(name, min(found), max(found)) for name, found in texts.items() if len(found) == 2]
    records = sorted(_rescued(pairs, spec), key=lambda record: record.offset)[:MAX_RECORDS]
    ends = [record.offset + stored_length(spec, record) for record in records]
    declared = LENGTH_BYTES + int.from_bytes(remains[:LENGTH_BYTES], "little")
    for start in dict.fromkeys((declared, file_bytes - max(ends, default=0))):
        there = [record for record, end in zip(records, ends, strict=True) if start + end <= file_bytes]
        if 0 < start <= LENGTH_BYTES + MAX_HEADER_BYTES and there:
            yield [record._replace(offset=start + record.offset) for record in there]


def _rescued(pairs: list[tuple[str, bytes, bytes]], spec: FeatureSpec) -> list[Record]:
    """The records, their offsets counted from where the data begin, whose name, checksum and entry fit together."""
    packed = bool(pairs) and pairs[0][2].startswith(f'{{"dtype":"{CODED_DTYPE}"'.encode())
    codec = coded_form(spec.feature_dtype) if packed else NONE
    try:
        checksums = {name: json.loads(checksum) for name, checksum, _ in pairs}
        rows, _ = _table({name: json.loads(entry) for name, _, entry in pairs}, checksums, spec, codec)
    except ValueError:
        half = len(pairs) // 2
        return _rescued(pairs[:half], spec) + _rescued(pairs[half:], spec) if half else []
    return [record for _, record in unpack_rows(rows)]

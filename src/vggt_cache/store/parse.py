"""From the first bytes of a shard to its records. A header is not believed.

Whatever the bytes are, `parse_header` returns records that the format allows, or raises ShardFormatError.
Nothing is read or allocated here that is much larger than the bytes given.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from vggt_cache.errors import ShardFormatError, SpecMismatchError
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.format import (
    DTYPE_NAMES,
    FORMAT_NAME,
    FORMAT_VERSION,
    LENGTH_BYTES,
    MAX_CHANNELS,
    MAX_DATA_BYTES,
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    MAX_SIDE,
    payload_bytes,
)
from vggt_cache.store.rows import ROW_DTYPE, Record, Rows, unpack_rows

Integers = npt.NDArray[np.int64]
_KEY = re.compile(r"[0-9a-f]{32}")
_ENTRY_FIELDS = itemgetter("dtype", "shape", "data_offsets")


class ForeignShardError(ShardFormatError):
    """An intact shard that does not belong here: another format version, another specification, not a plain file.

    Never removed by us: it may be somebody's good data in the wrong place.
    """


@dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """What a shard's header says, checked for sense but not against the file's length."""

    spec: FeatureSpec
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
        rows, data_end = _table(names, metadata, spec, LENGTH_BYTES + length)
    except (ValueError, RecursionError) as error:
        _refuse(shard, str(error) or type(error).__name__)
    return ShardHeader(spec=spec, rows=rows, data_end=data_end)


def _refuse(shard: str, reason: str) -> NoReturn:
    raise ShardFormatError(f"shard {shard} cannot be read: {reason}")


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
        return parse_spec(text)
    except SpecMismatchError as error:
        raise ValueError(str(error)) from error


def parse_spec(text: str) -> FeatureSpec:
    """The specification that `text` is the canonical JSON of, fit to store features. Raises SpecMismatchError."""
    spec = FeatureSpec.from_json(text)
    if type(spec.encoder.channels) is not int or not 1 <= spec.encoder.channels <= MAX_CHANNELS:
        raise SpecMismatchError(
            f"the cache's specification has features of {_short(spec.encoder.channels)} channels, which cannot be: it "
            "is damaged; precompute again into a new directory"
        )
    return spec


def _table(
    names: dict[str, Any], metadata: dict[str, Any], spec: FeatureSpec, data_start: int
) -> tuple[Rows, int]:
    """The records as rows, and the length that the file must have."""
    checksums = {name: value for name, value in metadata.items() if _KEY.fullmatch(name)}
    if checksums.keys() != names.keys():
        raise ValueError("the names of its records are not those of its checksums")
    shapes, spans = _geometry(list(names.values()), DTYPE_NAMES[spec.feature_dtype])
    order = np.argsort(spans[:, 0], kind="stable")
    shapes, spans = shapes[order], spans[order]
    _check_geometry(shapes, spans, spec)
    rows = np.zeros(len(names), ROW_DTYPE)
    keys = np.frombuffer(_from_hex(list(names)), ">u8").reshape(-1, 2)[order]
    rows["high"], rows["low"] = keys[:, 0], keys[:, 1]
    rows["checksum"] = np.frombuffer(_from_hex([checksums[name] for name in names]), "V16")[order]
    rows["offset"], rows["h"], rows["w"] = data_start + spans[:, 0], shapes[:, 0], shapes[:, 1]
    return rows, data_start + int(spans[:, 1].max(initial=0))


def _geometry(entries: list[Any], dtype: str) -> tuple[Integers, Integers]:
    """Shapes [records, 3] and byte spans [records, 2] of entries which have just these, and `dtype`."""
    if any(type(entry) is not dict or len(entry) != 3 for entry in entries):
        raise ValueError("a record has not exactly dtype, shape and data_offsets")
    try:
        fields = list(map(_ENTRY_FIELDS, entries))
    except KeyError as error:
        raise ValueError(f"a record has no {error}") from error
    wrong = [found for found, _, _ in fields if found != dtype]
    if wrong:
        raise ValueError(f"a record has dtype {_short(wrong[0])}, not {dtype}")
    return _integers([shape for _, shape, _ in fields], 3), _integers([span for _, _, span in fields], 2)


def _integers(lists: list[Any], length: int) -> Integers:
    """Lists of so many integers as an array [lists, length]."""
    if any(type(item) is not list or len(item) != length for item in lists):
        raise ValueError(f"a record has something else where {length} integers are needed")
    if not set(map(type, chain.from_iterable(lists))) <= {int}:
        raise ValueError("a record has something else where an integer is needed")
    try:
        return np.array(lists, np.int64).reshape(-1, length)
    except OverflowError as error:
        raise ValueError("a record has an integer of more than 64 bits") from error


def _check_geometry(shapes: Integers, spans: Integers, spec: FeatureSpec) -> None:
    """Raise ValueError unless the spans, in order, follow each other from 0 and are as long as the shapes say."""
    sides, channels = shapes[:, :2], spec.encoder.channels
    if not ((sides >= 1) & (sides <= MAX_SIDE)).all() or (shapes[:, 2] != channels).any():
        raise ValueError(f"a record's shape is not [h, w, {channels}] with sides of 1 to {MAX_SIDE} patches")
    if not ((spans >= 0) & (spans <= MAX_DATA_BYTES)).all():
        raise ValueError(f"a record lies outside of the {MAX_DATA_BYTES} bytes that a shard can have")
    if (spans[:, 0] != np.append(0, spans[:, 1])[: len(spans)]).any():
        raise ValueError("its records do not follow each other without gaps")
    if (spans[:, 1] - spans[:, 0] != sides[:, 0] * sides[:, 1] * payload_bytes(spec, 1, 1)).any():
        raise ValueError("a record has more or fewer bytes than its shape says")


def _from_hex(texts: list[Any]) -> bytes:
    """Texts of 32 lower-case hexadecimal digits as bytes, one after the other."""
    wrong = [text for text in texts if type(text) is not str or not _KEY.fullmatch(text)]
    if wrong:
        raise ValueError(f"{_short(wrong[0])} stands where 32 hexadecimal digits are needed")
    return bytes.fromhex("".join(texts))


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal form
        text = "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."

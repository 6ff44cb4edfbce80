"""From the entries of a header to where records lie, as arrays. Nothing in them is believed.

Two forms: records as they are, whose length follows from their shape; and packed ones, which are bytes to
safetensors and whose shape stands beside their checksum. All raise ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vggt_cache.codec.base import Codec
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.format import (
    CODED_DTYPE,
    DTYPE_NAMES,
    MAX_DATA_BYTES,
    MAX_SIDE,
    MAX_STORED_BYTES,
    payload_bytes,
)

Integers = npt.NDArray[np.int64]
_ENTRY_FIELDS = itemgetter("dtype", "shape", "data_offsets")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_DIGEST_AND_GRID = re.compile(r"([0-9a-f]{32}) ([1-9][0-9]{0,4}) ([1-9][0-9]{0,4})")


class Geometry(NamedTuple):
    """Of records, in the order of their names in the header."""

    sides: Integers
    """h and w [records, 2]"""
    spans: Integers
    """First byte and end [records, 2], counted from where data begin."""
    checksums: bytes
    """16 bytes each, one after the other."""
    stored: Integers | int
    """`stored_bytes` of each, or of all."""


def plain_geometry(entries: Mapping[str, Any], checksums: Mapping[str, Any], spec: FeatureSpec) -> Geometry:
    """Of records as they are."""
    if spec.feature_dtype not in DTYPE_NAMES:
        raise ValueError(f"its records are not packed, and {spec.feature_dtype} is kept in packed ones only")
    shapes, spans = _entries(list(entries.values()), DTYPE_NAMES[spec.feature_dtype], 3)
    sides, channels = shapes[:, :2], spec.encoder.channels
    if not ((sides >= 1) & (sides <= MAX_SIDE)).all() or (shapes[:, 2] != channels).any():
        raise ValueError(f"a record's shape is not [h, w, {channels}] with sides of 1 to {MAX_SIDE} patches")
    _check_spans(spans, sides[:, 0] * sides[:, 1] * payload_bytes(spec, 1, 1))
    digests = [_match(_DIGEST, checksums[name], "32 hexadecimal digits")[0] for name in entries]
    return Geometry(sides, spans, bytes.fromhex("".join(digests)), 0)


def coded_geometry(
    entries: Mapping[str, Any], checksums: Mapping[str, Any], spec: FeatureSpec, codec: Codec
) -> Geometry:
    """Of records that `codec` packed."""
    shapes, spans = _entries(list(entries.values()), CODED_DTYPE, 1)
    wanted = "32 hexadecimal digits, h and w"
    found = [_match(_DIGEST_AND_GRID, checksums[name], wanted).groups() for name in entries]
    sides = np.array([(int(h), int(w)) for _, h, w in found], np.int64).reshape(-1, 2)
    if (sides > MAX_SIDE).any():
        raise ValueError(f"a record has a side of more than {MAX_SIDE} patches")
    stored = shapes[:, 0]
    least, most = codec.size_limits(sides[:, 0] * sides[:, 1], spec.encoder.channels)
    if not ((stored >= least) & (stored <= np.minimum(most, MAX_STORED_BYTES))).all():
        raise ValueError(f"a record has more or fewer bytes than codec {codec.name} makes of its shape")
    _check_spans(spans, stored)
    return Geometry(sides, spans, bytes.fromhex("".join(digest for digest, _, _ in found)), stored)


def _entries(entries: list[Any], dtype: str, dimensions: int) -> tuple[Integers, Integers]:
    """Shapes [records, dimensions] and byte spans [records, 2] of entries which have just these, and `dtype`."""
    if any(type(entry) is not dict or len(entry) != 3 for entry in entries):
        raise ValueError("a record has not exactly dtype, shape and data_offsets")
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
        raise ValueError("a record has something else where an integer is needed")
    try:
        return np.array(lists, np.int64).reshape(-1, length)
    except OverflowError as error:
        raise ValueError("a record has an integer of more than 64 bits") from error


def _check_spans(spans: Integers, lengths: Integers) -> None:
    """Raise unless the spans, in the order of their begin, follow each other from 0 and are as long as they should."""
    if not ((spans >= 0) & (spans <= MAX_DATA_BYTES)).all():
        raise ValueError(f"a record lies outside of the {MAX_DATA_BYTES} bytes that a shard can have")
    in_order = spans[np.argsort(spans[:, 0], kind="stable")]
    if (in_order[:, 0] != np.append(0, in_order[:, 1])[: len(spans)]).any():
        raise ValueError("its records do not follow each other without gaps")
    if (spans[:, 1] - spans[:, 0] != lengths).any():
        raise ValueError("a record has more or fewer bytes than its shape says")


def _match(pattern: re.Pattern[str], text: Any, wanted: str) -> re.Match[str]:
    match = pattern.fullmatch(text) if type(text) is str else None
    if match is None:
        raise ValueError(f"{short(text)} stands where {wanted} are needed")
    return match


def short(value: object) -> str:
    """A value of a header, for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits has no decimal form
        text = "an enormous number"
    return text if len(text) <= 60 else text[:57] + "..."

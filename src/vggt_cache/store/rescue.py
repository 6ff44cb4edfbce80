"""What the remains of a damaged header still tell: a flipped bit must not cost more than the record that it hits.

Nothing is believed for it. A record found here is read like any other: its checksum covers its key and its shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from vggt_cache.codec import DTYPE_NAMES, NONE, codec_for, coded_form
from vggt_cache.identity import FeatureSpec
from vggt_cache.store.format import (
    CODED_DTYPE,
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    MAX_RECORDS,
    MAX_SIDE,
    MAX_STORED_BYTES,
)
from vggt_cache.store.record import Record

_REMAINS = re.compile(
    rb'"([0-9a-f]{32})":(?:'
    rb'\{"dtype":"(?P<dtype>[A-Z0-9]{2,4})","shape":\[(?P<shape>[0-9,]{1,32})\],'
    rb'"data_offsets":\[(?P<first>[0-9]{1,16}),(?P<end>[0-9]{1,16})\]\}'
    rb'|"(?P<digest>[0-9a-f]{32})(?: (?P<h>[1-9][0-9]{0,4}) (?P<w>[1-9][0-9]{0,4}))?")'
)
"""What the writer writes of one record: its entry, or its checksum."""


def rescue_records(remains: bytes, file_bytes: int, spec: FeatureSpec) -> Iterator[list[Record]]:
    """The records whose entry and checksum are whole in the remains of a header, once for each possible data start.

    Nothing but its checksum proves a record, and with it the place where the data begin: behind the header as its
    length field says; or so that they end with the file.
    """
    entries: dict[bytes, list[re.Match[bytes]]] = {}
    for match in _REMAINS.finditer(remains):
        entries.setdefault(match[1], []).append(match)
    # A name that does not stand there exactly twice is ambiguous, or half of it is lost.
    pairs = [sorted(found, key=_is_checksum) for found in entries.values() if len(found) == 2]
    relative = [found for entry, digest in pairs if (found := _rescued(entry, digest, spec)) is not None]
    relative = sorted(relative, key=lambda pair: pair[0].offset)[:MAX_RECORDS]
    if not relative:
        return
    declared = LENGTH_BYTES + int.from_bytes(remains[:LENGTH_BYTES], "little")
    for data_start in dict.fromkeys((declared, file_bytes - max(end for _, end in relative))):
        there = [record for record, end in relative if data_start + end <= file_bytes]
        if 0 < data_start <= LENGTH_BYTES + MAX_HEADER_BYTES and there:
            yield [record._replace(offset=data_start + record.offset) for record in there]


def _is_checksum(match: re.Match[bytes]) -> bool:
    return match["digest"] is not None


def _rescued(entry: re.Match[bytes], digest: re.Match[bytes], spec: FeatureSpec) -> tuple[Record, int] | None:
    """The record, its offset counted from where data begin, and its end; None unless all of it fits together."""
    if _is_checksum(entry) or not _is_checksum(digest):
        return None
    first, length = int(entry["first"]), int(entry["end"]) - int(entry["first"])
    shape = entry["shape"].split(b",")
    packed = entry["dtype"] == CODED_DTYPE.encode()
    codec = coded_form(spec.feature_dtype) if packed else NONE
    try:
        h, w = (int(digest["h"]), int(digest["w"])) if packed else (int(shape[0]), int(shape[1]))
        expected = [length] if packed else [h, w, spec.encoder.channels]
        if [int(side) for side in shape] != expected or not (1 <= h <= MAX_SIDE and 1 <= w <= MAX_SIDE):
            return None
    except (TypeError, ValueError, IndexError):
        return None
    if entry["dtype"].decode() != (CODED_DTYPE if codec != NONE else DTYPE_NAMES.get(spec.feature_dtype)):
        return None
    least, most = codec_for(codec, spec.feature_dtype).size_limits(h * w, spec.encoder.channels)
    if not least <= length <= min(most, MAX_STORED_BYTES if packed else most):
        return None
    key, checksum = (bytes.fromhex(text.decode()) for text in (entry[1], digest["digest"]))
    return Record(key, first, h, w, checksum, length if packed else 0), first + length

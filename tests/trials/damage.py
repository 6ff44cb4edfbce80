"""Trials with damaged bytes: real shards, and headers made up by somebody who means harm."""

from __future__ import annotations

import copy
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from store_kit import SPEC, make_key, save_index, shard_path, write_shard
from test_store_format import make_header
from trials.oracle import FEATURES, VALUES, read_shard, rescued
from vggt_cache.errors import CorruptRecordError, ShardFormatError, SpecMismatchError, StoreError
from vggt_cache.store import FeatureCache
from vggt_cache.store.format import MAX_RECORDS, MAX_SIDE
from vggt_cache.store.header import ForeignShardError, parse_header, parse_spec, rescue_records
from vggt_cache.store.record import payload_bytes, stored_length
from vggt_cache.store.tensors import bytes_of

NUMBERS = (1, 2, 3)
RANDOM_PER_SEED = 500
HEADERS_PER_SEED = 1000
LONGEST_S = 5.0
MOST_MEMORY_BYTES = 512 * 1024 * 1024


class SmallStore:
    """One shard of three records, whose bytes can be replaced."""

    def __init__(self, folder: Path, *, indexed: bool) -> None:
        self.folder, self.indexed = folder, indexed
        name = write_shard(
            folder, {number: FEATURES[number, 0] for number in NUMBERS}, max_records=len(NUMBERS)
        )
        if indexed:
            save_index(folder)
        self.path = shard_path(folder, name)
        self.path.chmod(0o644)
        self.good = self.path.read_bytes()
        self.records = parse_header(self.good, name).records
        self.data_start = self.records[0].offset

    def check(self, data: bytes) -> None:
        """Answers from these bytes are right, absent or refused, and right wherever nothing is wrong."""
        self.path.write_bytes(data)
        with FeatureCache.open(self.folder, io="direct" if self.indexed else "buffered") as cache:
            found = {number: self._answer(cache, number) for number in NUMBERS}
        assert all(answer in ("none", "damaged", VALUES[number, 0]) for number, answer in found.items())
        whole_header = data[: self.data_start] == self.good[: self.data_start]
        if self.indexed and not whole_header:
            return  # the index may still know what the header hides
        records = read_shard(data, self.good)
        assert whole_header <= (records is not None)
        if not _looks_foreign(data):
            known = rescued(data, self.good) if records is None else records
            expected = {n: "damaged" if value is None else value for n, value in known.items()}
            assert {n: found[n] for n in known} == expected

    @staticmethod
    def _answer(cache: FeatureCache, number: int) -> str | bytes:
        try:
            feature = cache.get_by_key(make_key(number))
        except CorruptRecordError:
            return "damaged"
        except StoreError:
            return "none"
        return "none" if feature is None else bytes(bytes_of(feature))


def _looks_foreign(data: bytes) -> bool:
    """Whether a reader takes the shard for one of another version and store, which is nobody's to repair."""
    try:
        parse_header(data, "x")
    except ForeignShardError:
        return SPEC.fingerprint.encode() not in data
    except ShardFormatError:
        pass
    return False


def every_bit_and_length(seed: int, folder: Path) -> int:
    """Every bit of a small shard flipped, and the shard cut to every length; odd seeds with an index."""
    store, count = SmallStore(folder, indexed=seed % 2 == 1), 0
    for length in range(len(store.good) + 1):
        store.check(store.good[:length])
        count += 1
    for position in range(len(store.good)):
        for bit in range(8):
            changed = bytes([store.good[position] ^ 1 << bit])
            store.check(store.good[:position] + changed + store.good[position + 1 :])
            count += 1
    return count


# ---------------------------------------------------------------- random damage


def _stretch(random: Random, length: int) -> tuple[int, int]:
    start = random.randrange(length)
    return start, min(length, start + random.choice((1, 2, 16, 48, 512, 4096)))


def _zero(store: SmallStore, random: Random) -> bytes:
    start, stop = _stretch(random, len(store.good))
    return store.good[:start] + bytes(stop - start) + store.good[stop:]


def _garbage(store: SmallStore, random: Random) -> bytes:
    start, stop = _stretch(random, len(store.good))
    return store.good[:start] + random.randbytes(stop - start) + store.good[stop:]


def _misplaced(store: SmallStore, random: Random) -> bytes:
    """A stretch written over another one of the same file."""
    start, stop = _stretch(random, len(store.good))
    source = random.randrange(len(store.good) - (stop - start) + 1)
    return store.good[:start] + store.good[source : source + stop - start] + store.good[stop:]


def _swapped(store: SmallStore, random: Random) -> bytes:
    """Two records exchanged: their payloads, names, checksums or entries."""
    a, b = random.sample(store.records, 2)
    what = random.choice(("payload", "name", "checksum", "offsets"))
    if what == "payload":
        size, data = payload_bytes(SPEC, 2, 3), bytearray(store.good)
        data[a.offset : a.offset + size], data[b.offset : b.offset + size] = (
            store.good[b.offset : b.offset + size],
            store.good[a.offset : a.offset + size],
        )
        return bytes(data)
    first, second = (a.checksum, b.checksum) if what == "checksum" else (a.key, b.key)
    if what == "offsets":
        size = payload_bytes(SPEC, 2, 3)
        first, second = (
            b"%d,%d" % (record.offset - store.data_start, record.offset - store.data_start + size)
            for record in (a, b)
        )
    else:
        first, second = first.hex().encode(), second.hex().encode()
    text = store.good.replace(first, b"\0").replace(second, first).replace(b"\0", second)
    return text if len(text) == len(store.good) else store.good


def _cut_or_longer(store: SmallStore, random: Random) -> bytes:
    return store.good[: random.randrange(len(store.good))] + random.randbytes(random.choice((0, 0, 1, 100)))


def _bits(store: SmallStore, random: Random) -> bytes:
    data = bytearray(store.good)
    for _ in range(random.randint(1, 4)):
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


DAMAGES: tuple[Callable[[SmallStore, Random], bytes], ...] = (
    _zero, _garbage, _misplaced, _swapped, _cut_or_longer, _bits,
)  # fmt: skip


def random_damage(seed: int, folder: Path) -> int:
    """Zeroed, overwritten, misplaced, exchanged, cut or lengthened parts of a small shard."""
    store, random = SmallStore(folder, indexed=seed % 2 == 1), Random(seed)
    for _ in range(RANDOM_PER_SEED):
        store.check(random.choice(DAMAGES)(store, random))
    return RANDOM_PER_SEED


# ---------------------------------------------------------------- hostile headers

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 48, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, 1e308, "", "BF16",
    "F16", "F32", "I64", [], {}, [0, 48], [48, 0], [2, 3, 4], [[]], "a" * 32, "A" * 32,
    "0" * 64, "\ud800", "__metadata__",
)  # fmt: skip


def _spots(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a structure with each of its places."""
    places = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    return [(value, place) for place in places] + [spot for place in places for spot in _spots(value[place])]


def _mutate(header: Any, random: Random) -> None:
    spots = _spots(header)
    container, place = random.choice(spots)
    action = random.randrange(4)
    if action == 0:
        container[place] = copy.deepcopy(
            random.choice(STRANGE)
        )  # else the next mutation would change the table
    elif action == 1:
        del container[place]
    elif action == 2:
        other, there = random.choice(spots)
        if there in other if isinstance(other, dict) else there < len(other):
            container[place] = json.loads(json.dumps(other[there]))
    elif isinstance(container, dict):
        container[random.choice(("a" * 32, make_key(9).hex(), "x", "__metadata__"))] = container.pop(place)
    else:
        container[place] = (
            container[place] + random.choice((-1, 1)) if isinstance(container[place], int) else -1
        )


def hostile_header(random: Random, good: bytes) -> bytes:
    """A sound header of which some parts, at any depth, are replaced, dropped, moved or renamed; then some bytes."""
    header = json.loads(good[8:])
    for _ in range(random.choice((1, 1, 2, 5))):
        if header:
            _mutate(header, random)
    text = bytearray(json.dumps(header).encode("utf-8", "surrogatepass"))
    for _ in range(random.choice((0, 0, 1, 3))):
        text[random.randrange(len(text))] = random.randrange(256)
    length = random.choice((len(text),) * 8 + (0, 1, len(text) - 1, len(text) + 1, 2**22, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + bytes(text) + random.choice((b"", b" " * 64, bytes(64)))


def hostile_headers(seed: int, folder: Path) -> int:
    """Every header is refused, or all of its records are sound; in bounded time and memory."""
    random, good = Random(seed), make_header(random_count(seed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(HEADERS_PER_SEED):
        started_s = time.monotonic()
        check_header(hostile_header(random, good))
        _check_spec(random)
        assert time.monotonic() - started_s < LONGEST_S
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY_BYTES
    return HEADERS_PER_SEED


def random_count(seed: int) -> int:
    """How many records the sound header has."""
    return (1, 3, 3, 8)[seed % 4]


def check_header(data: bytes) -> None:
    try:
        header = parse_header(data, "x")
    except ShardFormatError:
        check_rescued(data)
        return
    position = 8 + int.from_bytes(data[:8], "little")
    assert position <= len(data)
    for record in header.records:
        assert record.offset == position
        assert 1 <= record.h <= MAX_SIDE
        assert 1 <= record.w <= MAX_SIDE
        position += stored_length(header.spec, record)
    assert position == header.data_end
    assert len({record.key for record in header.records}) == len(header.records)


def check_rescued(data: bytes) -> None:
    """What the remains of a header tell keeps within the limits, and within the file."""
    file_bytes = len(data) + 3 * payload_bytes(SPEC, 2, 3)
    for records in rescue_records(data, file_bytes, SPEC):
        assert 0 < len(records) <= MAX_RECORDS
        assert len({record.key for record in records}) == len(records)
        for record in records:
            assert 1 <= record.h <= MAX_SIDE
            assert 1 <= record.w <= MAX_SIDE
            assert 0 < record.offset < record.offset + stored_length(SPEC, record) <= file_bytes


def _check_spec(random: Random) -> None:
    """The same for the manifest, spec.json: it is refused, or it is the one that was written."""
    fields = json.loads(SPEC.to_json())
    _mutate(fields, random)
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    try:
        found = parse_spec(text)
    except SpecMismatchError:
        return
    assert found.to_json() == text
    assert (found == SPEC) == (text == SPEC.to_json())

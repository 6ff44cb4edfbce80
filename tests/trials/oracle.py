"""What a store must hold, remembered outside of it, and read from its files by other code than the store's.

`read_shard` is the reader of docs/format.md. The oracle knows what was promised (every commit that returned),
what may be there (every record that somebody tried to write) and what was damaged on purpose.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
import xxhash

from simulated_disk import Disk
from store_kit import SPEC, make_feature, make_key
from vggt_cache.store.tensors import bytes_of

NUMBERS = range(20)
VARIANTS = 3
"""How many different features one key may get, so that it shows which commit an answer is from."""
KEYS = {make_key(number): number for number in NUMBERS}
FEATURES = {(n, v): make_feature(n + 1000 * v) for n in NUMBERS for v in range(VARIANTS)}
VALUES = {known: bytes(bytes_of(feature)) for known, feature in FEATURES.items()}
SHARD = re.compile(r"[0-9a-f]{12}-[0-9a-f]{16}\.safetensors")
_HEX = re.compile(r"[0-9a-f]{32}")
Records = dict[int, bytes | None]
"""Number to payload; None where it does not match its checksum."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


@cache
def _split(data: bytes) -> tuple[int, dict[str, Any], dict[str, str]] | None:
    """Where data begin, the records' entries, and the metadata; None where the header is broken."""
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        return None
    try:
        entries = json.loads(data[8:start], object_pairs_hook=_once)
        return start, entries, entries.pop("__metadata__")
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, MemoryError):
        return None


def _plain(split: tuple[int, dict[str, Any], dict[str, str]]) -> Any:
    """All of a header but the values of its checksums."""
    _, entries, metadata = split
    return entries, {name: text for name, text in metadata.items() if name not in entries}


@cache
def read_shard(data: bytes, original: bytes) -> Records | None:
    """Records of a shard whose bytes were `original`; None where its header says something else than it did."""
    found, before = _split(data), _split(original)
    if found is None or before is None or _plain(found) != _plain(before):
        return None
    start, entries, checksums = found
    if any(not _HEX.fullmatch(checksums.get(name, "")) for name in entries):
        return None
    return {
        KEYS[bytes.fromhex(name)]: _payload(data, start, name, entry, checksums[name])
        for name, entry in entries.items()
    }


def _payload(data: bytes, start: int, name: str, entry: dict[str, Any], checksum: str) -> bytes | None:
    first, last = (start + offset for offset in entry["data_offsets"])
    tail = bytes.fromhex(name) + entry["dtype"].encode()
    tail += b"".join(side.to_bytes(4, "little") for side in entry["shape"])
    sound = xxhash.xxh3_128_hexdigest(data[first:last] + tail) == checksum
    return data[first:last] if sound else None


@cache
def rescued(data: bytes, original: bytes) -> Records:
    """What a broken header still tells: records whose entry stands in it as in `original`, with one checksum."""
    before = _split(original)
    assert before is not None
    start, entries, _ = before
    remains, left, checksums = data[:start], {}, {}
    for name, entry in entries.items():
        text = f'"{name}":{json.dumps(entry, separators=(",", ":"))}'.encode()
        digests = re.findall(f'"{name}":"([0-9a-f]{{32}})"'.encode(), remains)
        if remains.count(text) == len(digests) == 1:
            left[name], checksums[name] = entry, digests[0].decode()
    last = max((entry["data_offsets"][1] for entry in left.values()), default=0)
    for begin in (8 + int.from_bytes(data[:8], "little"), len(data) - last):
        there = {name: entry for name, entry in left.items() if begin + entry["data_offsets"][1] <= len(data)}
        found = {name: _payload(data, begin, name, entry, checksums[name]) for name, entry in there.items()}
        in_order = sorted(found, key=lambda name: entries[name]["data_offsets"])
        if any(found[name] is not None for name in in_order[:4]):
            return {KEYS[bytes.fromhex(name)]: value for name, value in found.items()}
    return {}


def is_known(number: int, feature: torch.Tensor) -> bool:
    """Whether this is one of the features that belong to this number."""
    return bytes(bytes_of(feature)) in {VALUES[number, variant] for variant in range(VARIANTS)}


class Oracle:
    """Follows one store on a simulated disk."""

    def __init__(self, disk: Disk, cache_dir: str) -> None:
        self.disk = disk
        self.cache_dir = cache_dir
        self.attempted: dict[int, set[bytes]] = defaultdict(set)
        self.acknowledged: dict[str, set[int]] = {}
        """Numbers in each shard whose commit returned, or on which `prune` relied."""
        self.original: dict[str, bytes] = {}
        self.damaged: dict[str, bytes] = {}
        """Shards that were damaged on purpose, with what they hold since."""
        self.pruned = False

    @property
    def shards_path(self) -> str:
        return f"{self.cache_dir}/{SPEC.short_name}/shards"

    @property
    def index_path(self) -> str:
        return f"{self.cache_dir}/{SPEC.short_name}/index/rows"

    def contents(self, name: str) -> bytes:
        data = self.disk.contents(f"{self.shards_path}/{name}")
        assert data is not None, f"shard {name} is lost"
        return data

    def names(self) -> list[str]:
        return [name for name in self.disk.listing(self.shards_path) if SHARD.fullmatch(name)]

    # ------------------------------------------------------------ what happened

    def attempt(self, number: int, variant: int) -> None:
        self.attempted[number].add(VALUES[number, variant])

    def acknowledge(self, name: str, numbers: set[int]) -> None:
        self.acknowledged[name] = numbers
        self.original[name] = self.contents(name)

    def damage(self, name: str, data: bytes) -> None:
        """Replace a shard's bytes by others."""
        self.original.setdefault(name, self.contents(name))
        self.damaged[name] = data
        self.disk.alter(f"{self.shards_path}/{name}", data)

    # ------------------------------------------------------------ what must be so

    def records(self) -> dict[str, Records | None]:
        """Of each shard that is there, its records; None where the header is broken."""
        found = {name: self.contents(name) for name in self.names()}
        return {name: read_shard(data, self.original.get(name, data)) for name, data in found.items()}

    def held(self) -> dict[str, Records]:
        """The same, with what can be rescued where the header is broken."""
        return {
            name: rescued(self.contents(name), self.original[name]) if found is None else found
            for name, found in self.records().items()
        }

    def intact(self, names: Iterable[str]) -> set[int]:
        """Numbers in those of these shards that nobody damaged."""
        records = self.records()
        return {number for name in names if name not in self.damaged for number in records.get(name) or ()}

    def check_files(self) -> None:
        """Nothing is torn, foreign or changed, and nothing acknowledged is lost."""
        records = self.records()
        for name, found in records.items():
            if name in self.damaged:
                continue
            assert found, f"shard {name} is torn"
            assert name not in self.original or self.contents(name) == self.original[name], (
                f"{name} was changed"
            )
            for number, value in found.items():
                assert value in self.attempted[number], f"number {number} in {name} is torn or foreign"
        for name in [name for name in self.acknowledged if name not in records]:
            self._account_for(name, records)

    def _account_for(self, gone: str, records: dict[str, Records | None]) -> None:
        """A shard that was acknowledged is not there: only `prune` may do that, and only with what is not needed."""
        assert self.pruned, f"shard {gone} was acknowledged and is lost"
        data = self.damaged.get(gone, self.original[gone])
        before = read_shard(data, self.original[gone])
        if before is None:
            before = rescued(data, self.original[gone])
        for number in sorted(self.acknowledged.pop(gone)):
            if before.get(number) is None:
                continue  # damaged before it was removed
            heirs = [name for name, found in records.items() if found and found.get(number) is not None]
            assert heirs, f"number {number} was acknowledged in {gone}, which was pruned, and is nowhere else"
            heir = max(heirs)
            self.acknowledged.setdefault(heir, set()).add(number)
            self.original.setdefault(heir, self.contents(heir))

    def served(self) -> tuple[dict[int, tuple[str, bytes | None]], list[str]]:
        """For each number the shard that serves it and the answer (None: damaged); and the broken shards."""
        answers = {
            number: (name, value)
            for name, found in sorted(self.held().items())
            for number, value in found.items()
        }
        return answers, sorted(name for name, found in self.records().items() if found is None)

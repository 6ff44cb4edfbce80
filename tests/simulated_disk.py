"""A disk in memory that can lose power, seen by several clients that can be killed, starved and misled.

One seed is one run: every decision comes from the random generators that are given. The model is harsher than
the file systems that we know. A name is on the disk only after its directory was synced, whatever else was; of
several changes to a directory any subset may survive; contents that were not synced may be cut, zeroed, or
mixed; a failed fsync drops what it should have written, and the next one succeeds all the same.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from random import Random

BLOCK_BYTES = 256
MODELS = ("names", "data", "both")
"""What a power loss may take: names in directories, contents of files, or both."""
Change = list[tuple[str, "Node | None"]]


def failure(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Node:
    """A file or a directory: what everybody sees, and what is on the disk."""

    def __init__(self, number: int, mode: int, now_s: float) -> None:
        self.number, self.mode, self.modified_s = number, mode, now_s
        self.links = 0
        self.locked_by: int | None = None
        self.data, self.durable = bytearray(), bytearray()
        self.dirty: set[int] = set()
        """Blocks that the next fsync will bring to the disk."""
        self.names: dict[str, Node] = {}
        self.durable_names: dict[str, Node] = {}
        self.pending: list[Change] = []
        """Changes of names that were not synced, each of them all or nothing."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    # ------------------------------------------------------------ contents

    def write(self, data: bytes, offset: int) -> None:
        self.data.extend(bytes(max(0, offset + len(data) - len(self.data))))
        self.data[offset : offset + len(data)] = data
        self.dirty.update(range(offset // BLOCK_BYTES, (offset + len(data) - 1) // BLOCK_BYTES + 1))

    def sync(self) -> None:
        self.durable = self._on_disk(self.dirty, len(self.data))
        self.dirty.clear()

    def fail_to_sync(self) -> None:
        """The system reports an error, and believes from now on that nothing is left to be written."""
        self.dirty.clear()

    def _on_disk(self, blocks: set[int], length: int) -> bytearray:
        """What the disk has when these of the new blocks reached it."""
        result = self.durable[:length] + bytes(max(0, length - len(self.durable)))
        for block in blocks:
            part = slice(block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES)
            result[part] = self.data[part]
        return result[:length]

    def _survivor(self, random: Random) -> bytearray:
        """Contents after a power loss that may take all that was not synced."""
        kept = random.choice((0.0, 0.5, 1.0))
        blocks = {block for block in sorted(self.dirty) if random.random() < kept}
        shortest = min(len(self.durable), len(self.data))
        lengths = (shortest, len(self.data), random.randint(shortest, len(self.data)))
        return self._on_disk(blocks, random.choice(lengths))

    # ------------------------------------------------------------ names

    def change(self, changes: Change) -> None:
        _apply(self.names, changes)
        self.pending.append(changes)

    def sync_names(self) -> None:
        self.durable_names = dict(self.names)
        self.pending.clear()

    def lose_power(self, random: Random, model: str) -> None:
        """Become what the disk has."""
        if model in ("names", "both"):
            kept = random.choice((0.0, 0.5, 0.9))
            for changes in self.pending:
                if random.random() < kept:
                    _apply(self.durable_names, changes)
            self.names = dict(self.durable_names)
        self.data = (
            self._survivor(random) if model in ("data", "both") else self._on_disk(self.dirty, len(self.data))
        )
        self.durable = bytearray(self.data)
        self.sync_names()
        self.dirty.clear()
        self.locked_by = None


def _apply(names: dict[str, Node], changes: Change) -> None:
    for name, node in changes:
        if node is None:
            names.pop(name, None)
        else:
            names[name] = node


class Disk:
    """All files, the clock, and the clients' common history."""

    def __init__(self) -> None:
        self.now_s = 1.0e9
        self.tick = 0
        """Operations so far, of all clients."""
        self.powered = True
        self._next_number = 1
        self.root = self.new_node(stat.S_IFDIR | 0o755)
        self.changed: dict[tuple[int, str], tuple[int, object]] = {}
        """For each name in each directory: when it was last changed, and by whom."""
        self.at_tick: Callable[[int], None] = lambda tick: None
        """Called before every operation; may cut the power."""

    def new_node(self, mode: int) -> Node:
        self._next_number += 1
        return Node(self._next_number, mode, self.now_s)

    def pass_time(self, seconds: float = 100.0) -> None:
        """Long enough for every client to see what the others did."""
        self.now_s += seconds
        self.changed.clear()

    def change(self, directory: Node, changes: Change, by: object) -> None:
        for name, _ in changes:
            if name in directory.names:
                directory.names[name].links -= 1
        directory.change(changes)
        for name, node in changes:
            self.changed[directory.number, name] = (self.tick, by)
            if node is not None:
                node.links += 1

    def lose_power(self, random: Random, model: str) -> None:
        """Come back with what was on the disk. All clients are dead; use new ones."""
        for node in list(self.nodes()):
            node.lose_power(random, model)
        self.changed.clear()
        self.powered = True

    # ------------------------------------------------------------ looking in from outside, without a trace

    def nodes(self) -> Iterator[Node]:
        seen, todo = set(), [self.root]
        while todo:
            node = todo.pop()
            if node.number not in seen:
                seen.add(node.number)
                yield node
                todo += [*node.names.values(), *node.durable_names.values()]
                todo += [child for changes in node.pending for _, child in changes if child is not None]

    def find(self, path: str) -> Node | None:
        node: Node | None = self.root
        for part in filter(None, path.split("/")):
            node = node.names.get(part) if node is not None else None
        return node

    def listing(self, path: str) -> list[str]:
        node = self.find(path)
        return sorted(node.names) if node is not None else []

    def contents(self, path: str) -> bytes | None:
        node = self.find(path)
        return None if node is None else bytes(node.data)

    def alter(self, path: str, data: bytes) -> None:
        """Another content, on the disk as well: damage, not a write."""
        node = self.find(path)
        assert node is not None
        node.data, node.durable = bytearray(data), bytearray(data)
        node.dirty.clear()

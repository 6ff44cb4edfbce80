"""The prefix tree of ordered frame lists: one node for each distinct prefix, which is one encoder pass.

In causal context a frame's result depends on the frames before it and on nothing else, so lists that begin alike
share all passes up to where they part.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, kw_only=True, slots=True)
class Node:
    """The last frame of one distinct prefix."""

    frame: Hashable
    depth: int
    """Number of earlier frames."""
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Positions of the lists that are exactly this prefix."""

    def subtree(self) -> Iterator[Node]:
        """The node and everything below it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)


def build_tree(lists: Iterable[Sequence[Hashable]]) -> list[Node]:
    """The first nodes of all lists, in the order of their first occurrence. Raises ValueError for an empty list."""
    roots: list[Node] = []
    known: dict[tuple[Node | None, Hashable], Node] = {}
    for position, frames in enumerate(lists):
        node: Node | None = None
        for depth, frame in enumerate(frames):
            parent, node = node, known.get((node, frame))
            if node is None:
                node = known[parent, frame] = Node(frame=frame, depth=depth, parent=parent)
                (roots if parent is None else parent.children).append(node)
        if node is None:
            raise ValueError(f"list {position} has no frames")
        node.ends.append(position)
    return roots

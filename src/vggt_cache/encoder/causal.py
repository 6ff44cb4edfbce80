"""Causal features of many frame lists, with everything that lists share computed once.

In causal context a frame's result depends on the frames before it and on nothing else. So lists are a prefix tree,
one node for each distinct prefix: each image goes through the patch tower once, each node once through the aggregator.

The tree is walked deepest nodes first, at most `batch_size` nodes of equal depth at a time. A node's keys and values
stand in one row of a `History`, behind those of all its ancestors. One child goes on in the row of its parent, and may
be followed there by the next child, since by then nothing of the first is needed; only children that are computed
beside another one need a copy of the prefix, in a row that nobody uses. So there is one History at a time, with
`batch_size` rows of the longest list, and nearly nothing in it is ever copied.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vggt_cache.encoder.blocks import Grid
from vggt_cache.encoder.history import History
from vggt_cache.encoder.model import Encoder, mixed_grids


@dataclass(kw_only=True)
class CausalStats:
    """Single frames, counted as they are computed; one object may be passed to several calls."""

    tower_passes: int = 0
    """Frames through the patch tower."""
    frame_passes: int = 0
    """Frames through the aggregator."""
    unshared_passes: int = 0
    """Frames through either, had every list been computed alone."""


def encode_lists(
    encoder: Encoder,
    lists: Sequence[Sequence[Hashable]],
    pixels: Callable[[Hashable], Tensor],
    *,
    batch_size: int,
    stats: CausalStats | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (position in `lists`, feature of that list's last frame), in any order.

    lists: frames in order, oldest first; equal objects are the same image. Equal lists are computed once.
    pixels: uint8 [H, W, 3] of a frame, sides multiples of 14; asked once per frame.

    Features are float32 [h, w, 2C] on the encoder's device, views of their batch. Raises FrameError for a list whose
    frames have several sizes, and whatever `pixels` raises.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    stats = stats if stats is not None else CausalStats()
    stats.unshared_passes += sum(map(len, lists))
    yield from _Walk(encoder, _prefix_tree(lists), pixels, batch_size, stats)


@dataclass(eq=False, kw_only=True, slots=True)
class _Node:
    """The last frame of one distinct prefix."""

    frame: Hashable
    depth: int
    """Number of earlier frames."""
    parent: _Node | None
    children: list[_Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    """Positions of the lists that are exactly this prefix."""
    unfinished: int = 0
    """How many children have nodes to compute in their subtree."""


def _prefix_tree(lists: Iterable[Sequence[Hashable]]) -> list[_Node]:
    """All nodes, each before what is below it. Raises ValueError for an empty list."""
    top = _Node(frame=None, depth=-1, parent=None)
    known: dict[tuple[_Node, Hashable], _Node] = {}
    for position, frames in enumerate(lists):
        node = top
        for depth, frame in enumerate(frames):
            parent = node
            if (parent, frame) not in known:
                node = _Node(frame=frame, depth=depth, parent=parent if depth else None)
                parent.children.append(node)
                parent.unfinished += 1
                known[parent, frame] = node
            node = known[parent, frame]
        if node is top:
            raise ValueError(f"list {position} has no frames")
        node.ends.append(position)
    nodes, stack = [], top.children[::-1]
    while stack:
        nodes.append(stack.pop())
        stack += reversed(nodes[-1].children)
    return nodes


class _Walk:
    """One walk over a tree; iterating it does the work."""

    def __init__(
        self,
        encoder: Encoder,
        nodes: Sequence[_Node],
        pixels: Callable[[Hashable], Tensor],
        batch_size: int,
        stats: CausalStats,
    ) -> None:
        self._encoder = encoder
        self._pixels = pixels
        self._batch_size = batch_size
        self._stats = stats
        self._rows = min(batch_size, sum(not node.children for node in nodes))
        self._longest = 1 + max((node.depth for node in nodes), default=0)
        self._uses = Counter(node.frame for node in nodes)
        self._upcoming = deque(self._uses)
        self._tokens: dict[Hashable, Tensor] = {}
        """Patch tokens [h, w, C] of frames: computed once, in full batches, and dropped after the last use."""
        self._ready = [[node for node in nodes if node.parent is None]]
        """By depth: nodes that are not computed, whose parent is."""
        self._history: History | None = None
        """Of one patch grid: another comes when the deepest ready nodes are roots, so that nobody needs this one."""
        self._row_of: dict[_Node, int] = {}
        """Of nodes that are computed and have unfinished children."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        try:
            while self._ready:
                if self._ready[-1]:
                    yield from self._compute(self._next_nodes())
                else:
                    self._ready.pop()
        finally:
            self._history = None  # who keeps an error keeps its traceback, and with it this walk

    def _next_nodes(self) -> dict[int, _Node]:
        """By row: some of the deepest nodes that are ready.

        No node as deep as these is unfinished, so in the row of a parent the places behind it are free.
        """
        taken: dict[int, _Node] = {}
        others: list[_Node] = []
        for node in self._ready[-1]:
            row = self._row_of[node.parent] if node.parent else None
            if row is None or row in taken:
                others.append(node)
            else:
                taken[row] = node
        free = sorted(set(range(self._rows)) - set(self._row_of.values()))
        taken.update(zip(free, others, strict=False))
        self._ready[-1] = others[len(free) :]
        return dict(sorted(taken.items()))

    def _prepare(self, frames: Iterable[Hashable]) -> None:
        """Have tokens of `frames`, and with them of the next ones of the walk as far as the batch has room."""
        batch = dict.fromkeys(frame for frame in frames if frame not in self._tokens)
        while batch and self._upcoming and len(batch) < self._batch_size:
            frame = self._upcoming.popleft()
            if self._uses[frame] and frame not in self._tokens:
                batch[frame] = None
        by_shape: dict[torch.Size, list[tuple[Hashable, Tensor]]] = {}
        for frame in batch:
            image = self._pixels(frame)
            by_shape.setdefault(image.shape, []).append((frame, image))
        for images in by_shape.values():
            tokens = self._encoder.patch_tokens(torch.stack([image for _, image in images]))
            self._stats.tower_passes += len(images)
            # Copies, so that one frame that is needed long does not keep its whole batch.
            self._tokens.update((frame, own.clone()) for (frame, _), own in zip(images, tokens, strict=True))

    def _of_one_grid(self, nodes: dict[int, _Node]) -> dict[int, _Node]:
        """First frames may have several grids: those of the first one's now, the others later."""
        first = next(iter(nodes.values()))
        grids = {node: tuple(self._tokens[node.frame].shape[:2]) for node in nodes.values()}
        grid = self._history.grid if self._history and first.parent else grids[first]
        others = [node for node in nodes.values() if grids[node] != grid]
        if others and first.parent:
            raise mixed_grids(grids[others[0]], grid)
        self._ready[-1][:0] = others
        return {row: node for row, node in nodes.items() if node not in others}

    def _compute(self, nodes: dict[int, _Node]) -> Iterator[tuple[int, Tensor]]:
        self._prepare(node.frame for node in nodes.values())
        nodes = self._of_one_grid(nodes)
        depth = next(iter(nodes.values())).depth
        tokens = torch.stack([self._tokens[node.frame] for node in nodes.values()])
        history = self._history_for((tokens.shape[1], tokens.shape[2]))
        for row, node in nodes.items():
            if history is not None and node.parent is not None and self._row_of[node.parent] != row:
                history.copy(self._row_of[node.parent], row, depth)
        wanted = [bool(node.ends) for node in nodes.values()]
        features = self._encoder.extend(tokens, history, list(nodes), depth, want_feature=wanted)
        self._stats.frame_passes += len(nodes)
        for row, node in nodes.items():
            self._uses[node.frame] -= 1
            if not self._uses[node.frame]:
                del self._tokens[node.frame]
            if node.children:
                self._row_of[node] = row
                self._ready += [[] for _ in range(depth + 2 - len(self._ready))]
                self._ready[depth + 1] += node.children
            else:
                self._finish(node)
        if features is None:
            return iter(())
        ending = [node for node in nodes.values() if node.ends]
        return ((end, feature) for node, feature in zip(ending, features, strict=True) for end in node.ends)

    def _history_for(self, grid: Grid) -> History | None:
        """None where no list has a second frame."""
        if self._longest > 1 and (self._history is None or self._history.grid != grid):
            self._history = None  # the old one's memory first
            self._history = self._encoder.new_history(grid, rows=self._rows, frames=self._longest)
        return self._history

    def _finish(self, node: _Node) -> None:
        """The node's whole subtree is done: it, and all ancestors of which that is now true, need no row."""
        while node.parent:
            node = node.parent
            node.unfinished -= 1
            if node.unfinished:
                return
            del self._row_of[node]

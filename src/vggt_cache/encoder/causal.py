"""Causal features of many frame lists, with everything that lists share computed once.

Each image goes through the patch tower once, each distinct prefix once through the aggregator. The tree is
walked deepest nodes first, at most `batch_size` nodes of equal depth at a time. A node's keys and values stand in one
row of a `History`, behind those of all its ancestors. One child goes on in the row of its parent, and may be followed
there by the next child, since by then nothing of the first is needed; only children that are computed beside another
one need a copy of the prefix, in a row that nobody uses. So there is one History at a time, with `batch_size` rows of
the longest list, and nearly nothing in it is ever copied.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cache.encoder.blocks import Grid
from vggt_cache.encoder.history import History
from vggt_cache.encoder.model import Encoder, mixed_grids, patch_grid
from vggt_cache.encoder.prefix_tree import Node, build_tree
from vggt_cache.errors import FrameError


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
    on_error: Callable[[int, FrameError], None] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields (position in `lists`, feature of that list's last frame), in any order.

    lists: frames in order, oldest first; equal objects are the same image. Equal lists are computed once.
    pixels: uint8 [H, W, 3] of a frame, sides multiples of 14; asked once per frame. May raise FrameError.
    on_error: called as on_error(position, error) for each list that cannot be computed, because `pixels` failed for
        one of its frames or because its frames have different sizes; the other lists go on. Without it,
        the first such error is raised.

    Features are float32 [h, w, 2C] on the encoder's device, views of their batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    stats = stats if stats is not None else CausalStats()
    roots = build_tree(lists)
    stats.unshared_passes += sum(map(len, lists))
    yield from _Walk(
        encoder, roots, _Tower(encoder, roots, pixels, batch_size, stats), batch_size, stats, on_error
    )


class _Tower:
    """Patch tokens of frames: each computed once, in full batches, and dropped after its last use."""

    def __init__(
        self,
        encoder: Encoder,
        roots: Iterable[Node],
        pixels: Callable[[Hashable], Tensor],
        batch_size: int,
        stats: CausalStats,
    ) -> None:
        self._encoder = encoder
        self._pixels = pixels
        self._batch_size = batch_size
        self._stats = stats
        self._uses = Counter(node.frame for root in roots for node in root.subtree())
        self._upcoming = deque(self._uses)
        self.tokens: dict[Hashable, Tensor] = {}
        """[h * w, C] of each frame that is prepared and still needed."""
        self.grids: dict[Hashable, Grid] = {}
        self.errors: dict[Hashable, FrameError] = {}
        """Why a prepared frame has no tokens."""

    def prepare(self, frames: Iterable[Hashable]) -> None:
        """Compute `frames`, and with them the next ones of the walk as far as the batch has room."""
        batch = dict.fromkeys(frame for frame in frames if self._is_open(frame))
        while batch and self._upcoming and len(batch) < self._batch_size:
            frame = self._upcoming.popleft()
            if self._is_open(frame):
                batch[frame] = None
        by_shape: dict[torch.Size, list[tuple[Hashable, Tensor]]] = {}
        for frame in batch:
            try:
                image = self._pixels(frame)
            except FrameError as error:
                self.errors[frame] = error
            else:
                by_shape.setdefault(image.shape, []).append((frame, image))
        for images in by_shape.values():
            self._compute(images)

    def release(self, frame: Hashable) -> None:
        """One of the frame's nodes is done."""
        self._uses[frame] -= 1
        if not self._uses[frame]:
            for kept in (self.tokens, self.grids, self.errors):
                kept.pop(frame, None)

    def _is_open(self, frame: Hashable) -> bool:
        return self._uses[frame] > 0 and frame not in self.tokens and frame not in self.errors

    def _compute(self, images: Sequence[tuple[Hashable, Tensor]]) -> None:
        stacked = torch.stack([image for _, image in images])
        tokens = self._encoder.patch_tokens(stacked)
        self._stats.tower_passes += len(images)
        for (frame, _), own in zip(images, tokens, strict=True):
            self.grids[frame] = patch_grid(stacked)
            # A copy, so that one frame that is needed long does not keep its whole batch.
            self.tokens[frame] = own.clone()


class _Walk:
    """One walk over a tree; iterating it does the work."""

    def __init__(
        self,
        encoder: Encoder,
        roots: Sequence[Node],
        tower: _Tower,
        batch_size: int,
        stats: CausalStats,
        on_error: Callable[[int, FrameError], None] | None,
    ) -> None:
        self._encoder = encoder
        self._tower = tower
        nodes = [node for root in roots for node in root.subtree()]
        self._rows = min(batch_size, sum(not node.children for node in nodes))
        self._longest = 1 + max((node.depth for node in nodes), default=0)
        self._stats = stats
        self._on_error = on_error
        self._ready: list[list[Node]] = [list(roots)]
        """By depth: nodes that are not computed, whose parent is."""
        self._history: History | None = None
        """Of one patch grid: another comes when the deepest ready nodes are roots, so that nobody needs this one."""
        self._row_of: dict[Node, int] = {}
        """Of nodes that are computed and have unfinished children."""
        self._unfinished: dict[Node, int] = {}
        """How many children of such a node have nodes to compute in their subtree."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        try:
            while self._ready:
                if not self._ready[-1]:
                    self._ready.pop()
                elif nodes := self._computable(self._next_nodes()):
                    yield from self._compute(nodes)
        finally:
            self._history = None  # who keeps an error keeps its traceback, and with it this walk

    def _next_nodes(self) -> dict[int, Node]:
        """By row: some of the deepest nodes that are ready.

        No node as deep as these is unfinished, so in the row of a parent the places behind it are free.
        """
        taken: dict[int, Node] = {}
        others: list[Node] = []
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

    def _computable(self, nodes: dict[int, Node]) -> dict[int, Node]:
        """Those of `nodes` that have tokens and the grid of their list; the other lists are given up."""
        self._tower.prepare(node.frame for node in nodes.values())
        good: dict[int, Node] = {}
        for row, node in nodes.items():
            error = self._tower.errors.get(node.frame)
            if error is None and node.parent is not None and self._history is not None:
                grid = self._tower.grids[node.frame]
                error = mixed_grids(grid, self._history.grid) if grid != self._history.grid else None
            if error:
                self._fail(node, error)
            else:
                good[row] = node
        return self._of_one_grid(good)

    def _of_one_grid(self, nodes: dict[int, Node]) -> dict[int, Node]:
        """Roots may have several grids: those of the first one's now, the others later."""
        grids = [self._tower.grids[node.frame] for node in nodes.values()]
        later = [node for node, grid in zip(nodes.values(), grids, strict=True) if grid != grids[0]]
        self._ready[-1][:0] = later
        return {row: node for row, node in nodes.items() if node not in later}

    def _compute(self, nodes: dict[int, Node]) -> Iterator[tuple[int, Tensor]]:
        first = next(iter(nodes.values()))
        grid, depth = self._tower.grids[first.frame], first.depth
        history = self._history_for(grid)
        for row, node in nodes.items():
            if history is not None and node.parent is not None and self._row_of[node.parent] != row:
                history.copy(self._row_of[node.parent], row, depth)
        features = self._encoder.extend(
            torch.stack([self._tower.tokens[node.frame] for node in nodes.values()]),
            grid,
            history,
            list(nodes),
            depth,
            want_feature=[bool(node.ends) for node in nodes.values()],
        )
        self._stats.frame_passes += len(nodes)
        for row, node in nodes.items():
            self._tower.release(node.frame)
            if node.children:
                self._open(node, row)
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

    def _open(self, node: Node, row: int) -> None:
        """The node's children can be computed now."""
        self._row_of[node] = row
        self._unfinished[node] = len(node.children)
        if len(self._ready) == node.depth + 1:
            self._ready.append([])
        self._ready[node.depth + 1].extend(node.children)

    def _finish(self, node: Node) -> None:
        """The node's whole subtree is done: it, and all ancestors of which that is now true, need no row."""
        while node.parent:
            node = node.parent
            self._unfinished[node] -= 1
            if self._unfinished[node]:
                return
            del self._row_of[node], self._unfinished[node]

    def _fail(self, node: Node, error: FrameError) -> None:
        """Give up every list that goes through the node."""
        for below in node.subtree():
            self._tower.release(below.frame)
            for end in below.ends:
                if self._on_error is None:
                    raise error
                self._on_error(end, error)
        self._finish(node)

"""Causal features of many frame lists, with everything that lists share computed once.

Each image goes through the patch tower once, each distinct prefix once through the aggregator. The tree is
walked deepest nodes first, at most `batch_size` nodes of equal depth at a time, so that at each depth at most
`batch_size` nodes have unfinished descendants: no more than batch_size * (longest list - 1) FrameCaches are alive.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vggt_cache.encoder.blocks import Grid
from vggt_cache.encoder.model import Encoder, FrameCache, mixed_grids, patch_grid
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
        self._batch_size = batch_size
        self._stats = stats
        self._on_error = on_error
        self._ready: list[deque[Node]] = [deque(roots)]
        """By depth: nodes that are not computed, whose parent is."""
        self._caches: dict[Node, FrameCache] = {}
        """Of nodes that are computed and have unfinished children."""
        self._unfinished: dict[Node, int] = {}
        """How many children of such a node have nodes to compute in their subtree."""

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        while self._ready:
            if self._ready[-1]:
                for grid, nodes in self._next_batches().items():
                    yield from self._compute(grid, nodes)
            else:
                self._ready.pop()

    def _next_batches(self) -> dict[Grid, list[Node]]:
        """At most `batch_size` of the deepest nodes that are ready, by patch grid."""
        ready = self._ready[-1]
        steps = -(-len(ready) // self._batch_size)
        # An equal share for each of these steps, instead of full ones and a small last one.
        nodes = [ready.popleft() for _ in range(-(-len(ready) // steps))]
        self._tower.prepare(node.frame for node in nodes)
        batches: dict[Grid, list[Node]] = {}
        for node in nodes:
            error = self._tower.errors.get(node.frame) or self._other_size(node)
            if error:
                self._fail(node, error)
            else:
                batches.setdefault(self._tower.grids[node.frame], []).append(node)
        return batches

    def _other_size(self, node: Node) -> FrameError | None:
        grid = self._tower.grids[node.frame]
        if node.parent is None or self._caches[node.parent].grid == grid:
            return None
        return mixed_grids(grid, self._caches[node.parent].grid)

    def _compute(self, grid: Grid, nodes: Sequence[Node]) -> Iterator[tuple[int, Tensor]]:
        features, caches = self._encoder.extend(
            torch.stack([self._tower.tokens[node.frame] for node in nodes]),
            grid,
            [self._prefix(node) for node in nodes],
            want_feature=[bool(node.ends) for node in nodes],
            want_cache=[bool(node.children) for node in nodes],
        )
        self._stats.frame_passes += len(nodes)
        for node, cache in zip(nodes, caches, strict=True):
            self._tower.release(node.frame)
            if cache is None:
                self._finish(node)
            else:
                self._open(node, cache)
        if features is None:
            return iter(())
        ending = [node for node in nodes if node.ends]
        return ((end, feature) for node, feature in zip(ending, features, strict=True) for end in node.ends)

    def _prefix(self, node: Node) -> list[FrameCache]:
        caches: list[FrameCache] = []
        while node.parent:
            node = node.parent
            caches.append(self._caches[node])
        return caches[::-1]

    def _open(self, node: Node, cache: FrameCache) -> None:
        """The node's children can be computed now."""
        self._caches[node] = cache
        self._unfinished[node] = len(node.children)
        if len(self._ready) == node.depth + 1:
            self._ready.append(deque())
        self._ready[node.depth + 1].extend(node.children)

    def _finish(self, node: Node) -> None:
        """The node's whole subtree is done: it, and all ancestors of which that is now true, need no cache."""
        while node.parent:
            node = node.parent
            self._unfinished[node] -= 1
            if self._unfinished[node]:
                return
            del self._caches[node], self._unfinished[node]

    def _fail(self, node: Node, error: FrameError) -> None:
        """Give up every list that goes through the node."""
        for below in node.subtree():
            self._tower.release(below.frame)
            for end in below.ends:
                if self._on_error is None:
                    raise error
                self._on_error(end, error)
        self._finish(node)

"""The bytes as they are."""

from __future__ import annotations

from vggt_cache.codec.base import Cells


class Plain:
    """See `Codec`. For features of any dtype."""

    name = "none"

    def __init__(self, item_bytes: int) -> None:
        self._item_bytes = item_bytes

    def prepare(self) -> None:
        """Nothing is needed."""

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        exact = cells * (channels * self._item_bytes)
        return exact, exact

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        return feature

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        if len(stored) != len(feature):
            raise ValueError("its length does not fit its shape")
        feature[:] = stored

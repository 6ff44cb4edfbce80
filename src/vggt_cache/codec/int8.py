"""One byte a value: channel-normalised, then one scale per token. About half a percent off, and the spec says so.

A record of a feature [h, w, C]: the channels' normalisers, bfloat16 [C]; the tokens' scales, float32 [h * w]; the
values, int8 [h * w, C]. A value is int8 * scale * normaliser, two products in float32, rounded to bfloat16: the
same bits on every device.
"""

from __future__ import annotations

from vggt_cache.codec.base import Cells

NORMALISER_BYTES, SCALE_BYTES = 2, 4


class Int8:
    """See `Codec`. Needs torch, which is loaded on first use."""

    name = "int8"

    def prepare(self) -> None:
        """Nothing is needed."""

    def size_limits(self, cells: Cells, channels: int) -> tuple[Cells, Cells]:
        exact = NORMALISER_BYTES * channels + SCALE_BYTES * cells + cells * channels
        return exact, exact

    def encode(self, feature: memoryview, cells: int, channels: int) -> memoryview:
        import torch

        from vggt_cache.codec.quantise import encode_int8, of_bytes

        values = of_bytes(feature).view(torch.bfloat16).view(cells, channels)
        record: memoryview = encode_int8(values).numpy().data
        return record

    def decode(self, stored: memoryview, feature: memoryview, cells: int, channels: int) -> None:
        import torch

        from vggt_cache.codec.quantise import decode_rows, of_bytes

        if len(stored) != self.size_limits(cells, channels)[0]:
            raise ValueError("its length does not fit its shape")
        decode_rows(of_bytes(stored), of_bytes(feature).view(torch.bfloat16).view(cells, channels))

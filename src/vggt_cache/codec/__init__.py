"""How a feature's bytes are packed on disk. `docs/codecs.md` has the bytes and the figures.

none       as they are, which any safetensors library reads
lossless   bfloat16, exponents through zstandard: the same feature, a third smaller
int8       one byte a value. Another feature, so part of the specification: `feature_dtype` is `int8`

`none` and `lossless` are a property of a shard, since they do not change what is read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vggt_cache.errors import SettingsError, require_one_of

if TYPE_CHECKING:
    from vggt_cache.codec.base import Codec

CODECS = ("none", "lossless")
"""What a user may choose; `int8` comes with its feature_dtype."""
NONE, LOSSLESS, INT8 = "none", "lossless", "int8"

DTYPE_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}
"""safetensors' names. `int8` has none: such records are packed always."""
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 2, "uint8": 1}
"""Bytes of a value as it is given out."""


def shard_codec(feature_dtype: str, chosen: str = NONE) -> str:
    """Name of the codec of a new shard, for features of this dtype. Raises SettingsError where there is none."""
    if not chosen == feature_dtype == INT8:
        require_one_of("codec", chosen, CODECS)
    if chosen == LOSSLESS and feature_dtype != "bfloat16":
        raise SettingsError(
            f"codec {chosen} packs bfloat16, and these features are kept in {feature_dtype}: leave --codec out, or "
            "use --feature_dtype bfloat16"
        )
    return INT8 if feature_dtype == INT8 else chosen


def coded_form(feature_dtype: str) -> str:
    """Name of the codec that coded records of this dtype have; `none` where there is no such codec."""
    return {"bfloat16": LOSSLESS, INT8: INT8}.get(feature_dtype, NONE)


def codec_for(name: str, feature_dtype: str = "bfloat16") -> Codec:
    """The codec of this name, for features of this dtype. Raises SettingsError where there is none."""
    # Imported here: the command line asks for the names alone, and should start quickly.
    from vggt_cache.codec.base import Int8, Plain
    from vggt_cache.codec.lossless import Lossless

    codecs: dict[str, Codec] = {NONE: Plain(ITEM_BYTES[feature_dtype]), LOSSLESS: Lossless(), INT8: Int8()}
    require_one_of("codec", name, codecs)
    return codecs[name]

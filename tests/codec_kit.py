"""Small stores whose shards are packed by a codec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from store_kit import make_feature, make_key, make_spec, shard_path, write_shard
from vggt_cache.codec.quantise import decode_int8, encode_int8
from vggt_cache.identity import FeatureSpec

BF16, INT8 = make_spec(), make_spec(feature_dtype="int8")
NUMBERS = (1, 2, 3)


def write_packed(
    cache_dir: Path, numbers: Iterable[int] | Mapping[int, torch.Tensor], spec: FeatureSpec = BF16
) -> Path:
    """Commit features in one packed shard: lossless, or int8 for such a specification. Returns its path, writable."""
    codec = "lossless" if spec.feature_dtype == "bfloat16" else "int8"
    name = write_shard(cache_dir, numbers, spec, codec=codec, max_records=8)
    path = shard_path(cache_dir, name, spec)
    path.chmod(0o644)
    return path


def given_back(number: int, spec: FeatureSpec) -> torch.Tensor:
    """What a store of this specification gives back for `make_feature(number)`."""
    feature = make_feature(number, spec)
    if spec.feature_dtype != "int8":
        return feature
    h, w, channels = feature.shape
    record = encode_int8(feature.view(-1, channels))
    return decode_int8(record, h * w, channels).view(h, w, channels)


KEYS = {number: make_key(number) for number in NUMBERS}

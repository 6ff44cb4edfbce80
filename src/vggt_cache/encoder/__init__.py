"""VGGT's aggregator, written for feature extraction: `Checkpoint.open(location).load()` gives an `Encoder`."""

from vggt_cache.encoder.checkpoint import Checkpoint, expected_shapes
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.history import History
from vggt_cache.encoder.model import Encoder

__all__ = ["Checkpoint", "Encoder", "EncoderConfig", "History", "expected_shapes"]

"""VGGT's aggregator, written for feature extraction: `Checkpoint.open(location).load()` gives an `Encoder`."""

from vggt_cache.encoder.checkpoint import Checkpoint
from vggt_cache.encoder.config import EncoderConfig
from vggt_cache.encoder.history import History
from vggt_cache.encoder.model import Encoder
from vggt_cache.encoder.weights import expected_shapes

__all__ = ["Checkpoint", "Encoder", "EncoderConfig", "History", "expected_shapes"]
